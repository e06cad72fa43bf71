"""Where a run comes from: command, commits, what is in no commit."""

from __future__ import annotations

import subprocess
from pathlib import Path

from orchestrator.provenance import keep_changes, provenance
from orchestrator.spec.paths import PROJECT_DIR


def repository(folder: Path, text: str) -> str:
    """Make a repository of one file; return its commit."""
    folder.mkdir()
    (folder / "mine.py").write_text(text)
    name = ("-c", "user.name=ann", "-c", "user.email=ann@example.org")
    for words in (("init", "-q"), ("add", "."), (*name, "commit", "-qm", "first")):
        subprocess.run(["git", "-C", str(folder), *words], check=True)
    head = subprocess.run(
        ["git", "-C", str(folder), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    )
    return head.stdout.strip()


def test_the_command_can_be_given_again_as_it_is_told(tmp_path: Path) -> None:
    own = str(tmp_path / "my jobs")
    tags = provenance(["job=mine", "train.steps=5"], [str(PROJECT_DIR), own])
    assert tags["orchestrator.command"] == (
        f"orchestrator train --config-dir '{own}' job=mine train.steps=5"
    )


def test_the_users_own_code_has_its_commit_too(tmp_path: Path) -> None:
    commit = repository(tmp_path / "team", "a = 1\n")
    tags = provenance([], [str(PROJECT_DIR), str(tmp_path / "team")])
    assert tags["mlflow.source.git.commit"] == commit
    assert tags["orchestrator.git.commit.team"] == commit
    alone = provenance([], [str(tmp_path / "team")])
    assert alone["orchestrator.git.dirty"] == "false"
    (tmp_path / "team" / "mine.py").write_text("a = 2\n")
    alone = provenance([], [str(tmp_path / "team")])
    assert alone["orchestrator.git.dirty"] == "true"


def test_code_without_git_has_no_commit(tmp_path: Path) -> None:
    assert not [tag for tag in provenance([], [str(tmp_path)]) if "git" in tag]
    keep_changes([str(tmp_path)], tmp_path / "changes.diff")
    assert not (tmp_path / "changes.diff").exists()


def test_what_is_in_no_commit_is_kept_without_its_secrets(tmp_path: Path) -> None:
    folder, path = tmp_path / "team", tmp_path / "changes.diff"
    commit = repository(folder, "a = 1\nb = 2\n")
    keep_changes([str(folder)], path)
    assert not path.exists()
    (folder / "mine.py").write_text(
        "a = 3\nb = 2\nAPI_KEY = 'hunter2'\nurl = 'http://ann:hunter3@host'\ntokens = 4\n"
    )
    keep_changes([str(folder)], path)
    text = path.read_text()
    assert text.startswith(f"# {folder} since {commit}\n")
    assert "-a = 1\n+a = 3\n" in text and "+tokens = 4" in text
    assert "+API_KEY = ***" in text and "hunter" not in text
    # What git has written can be put back, but for the secrets.
    assert "\n b = 2\n" in text
