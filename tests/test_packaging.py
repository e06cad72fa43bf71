"""What a clone must hold for the two commands of the README to work anywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests.environment import without_make

ROOT = Path(__file__).parents[1]
LOCKS = sorted(path.name for path in (ROOT / "requirements").glob("*.lock"))
# Put together here so that this file does not name one either.
INDEX_HOSTS = tuple(
    ".".join(parts)
    for parts in (
        ("pypi", "org"),
        ("pypi", "python", "org"),
        ("python" + "hosted", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("anaconda", "org"),
        ("pypi", "nvidia", "com"),
    )
)


def committed_texts() -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    texts = {}
    for name in filter(None, listed.stdout.split("\0")):
        try:
            texts[name] = (ROOT / name).read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError):
            continue  # a picture; a file removed but not yet committed so
    return texts


def pinned(lock: str) -> dict[str, set[str]]:
    """Return the versions of each package in a lock; a universal lock may have several."""
    versions: dict[str, set[str]] = {}
    text = (ROOT / "requirements" / lock).read_text(encoding="utf-8")
    for name, version in re.findall(r"^([a-z0-9-]+)==(\S+)", text, flags=re.MULTILINE):
        versions.setdefault(name, set()).add(version)
    return versions


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *arguments], cwd=cwd, env=without_make(), capture_output=True, text=True
    )


def test_no_committed_file_names_a_package_index() -> None:
    found = [
        f"{name}: {host}"
        for name, text in committed_texts().items()
        for host in INDEX_HOSTS
        if host in text
    ]
    assert not found


def test_no_committed_file_names_a_path_of_this_machine() -> None:
    here = {str(ROOT), str(ROOT.resolve()), f"{Path.home()}/"} - {"/"}
    texts = committed_texts().items()
    assert not [f"{name}: {path}" for name, text in texts for path in here if path in text]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_requirement_of_a_lock_has_hashes(lock: str) -> None:
    text = (ROOT / "requirements" / lock).read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", re.sub(r"^\s*#.*\n?", "", text, flags=re.MULTILINE).strip())
    assert entries
    assert not [entry for entry in entries if "--hash=sha256:" not in entry]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_no_address_and_no_option(lock: str) -> None:
    lines = (ROOT / "requirements" / lock).read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if "://" in line or line.startswith("-")]


def test_every_environment_has_the_same_versions() -> None:
    cpu = pinned("cpu.lock")
    for other in ("gpu.lock", "dev.lock"):
        shared = {name: versions for name, versions in pinned(other).items() if name in cpu}
        assert shared == {name: cpu[name] for name in shared}


def test_cpu_and_gpu_have_one_tensorflow_each() -> None:
    # tensorflow stands in cpu.lock for the platforms that have no tensorflow-cpu.
    assert "tensorflow-cpu" in pinned("cpu.lock")
    assert "tensorflow-cpu" not in pinned("gpu.lock")
    assert "tensorflow" in pinned("gpu.lock")
    assert not {"tensorflow", "tensorflow-cpu"} & pinned("dev.lock").keys()


def test_every_direct_dependency_is_locked() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)
    wanted = {
        "cpu.lock": project["project"]["dependencies"]
        + project["project"]["optional-dependencies"]["cpu"],
        "gpu.lock": project["project"]["dependencies"]
        + project["project"]["optional-dependencies"]["gpu"],
        "dev.lock": project["dependency-groups"]["dev"],
        "bootstrap.lock": project["dependency-groups"]["bootstrap"],
    }
    for lock, requirements in wanted.items():
        names = {re.match(r"[A-Za-z0-9-]+", requirement)[0] for requirement in requirements}  # type: ignore[index]
        assert names <= pinned(lock).keys(), lock


def test_every_package_folder_is_installed() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        listed = tomllib.load(file)["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in ROOT.glob("orchestrator/**/*.py")}
    assert set(listed) == {".".join(folder.parts) for folder in folders}


def test_help_lists_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    assert phony
    targets = set(phony[1].split()) - {"FORCE"}
    lines = make().stdout.splitlines()
    assert {line.split()[1] for line in lines} == targets
    assert all(len(line.split()) > 3 for line in lines)


def test_help_fits_eighty_columns() -> None:
    assert max(map(len, make().stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (("train",), "-m orchestrator train"),
        (("train", "conf=mnist"), "-m orchestrator train job='mnist'"),
        (("train", "conf=my jobs/it's.yaml"), r"-m orchestrator train job='my jobs/it'\''s.yaml'"),
        (
            ("train", "conf=mnist", "args=strategy=multi_worker 'a=[1, 2]'"),
            "-m orchestrator train job='mnist' strategy=multi_worker 'a=[1, 2]'",
        ),
        (
            ("submit", "conf=mnist", "address=http://head:8265"),
            "-m orchestrator submit job='mnist' cluster.address='http://head:8265'",
        ),
    ],
)
def test_make_hands_conf_and_args_to_the_command_line(
    arguments: tuple[str, ...], command: str
) -> None:
    done = make("--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    assert " ".join(done.stdout.splitlines()[-1].split()).endswith(command)


def test_an_unknown_device_is_refused() -> None:
    done = make("setup", "device=tpu")
    assert done.returncode == 2
    assert "device=tpu is neither cpu nor gpu" in done.stderr


def test_set_up_refuses_an_unsuitable_python(tmp_path: Path) -> None:
    clone = copy_set_up(tmp_path)
    old = fake_python(tmp_path / "python3.10", "Python 3.10.1")
    done = make("train", "conf=mnist", f"PYTHON={old}", "device=cpu", cwd=clone)
    assert done.returncode == 2
    expected = f"PYTHON={old} is Python 3.10.1; Python 3.11, 3.12 or 3.13 is needed"
    assert f"set-up: {expected}" in done.stderr.splitlines()
    assert not (clone / ".venv").exists()


def test_set_up_leaves_a_foreign_environment_alone(tmp_path: Path) -> None:
    clone = copy_set_up(tmp_path)
    (clone / ".venv/bin").mkdir(parents=True)
    fake_python(clone / ".venv/bin/python", "Python 3.10.1")
    done = make("setup", "device=cpu", cwd=clone)
    assert done.returncode == 2
    assert ".venv holds Python 3.10.1" in done.stderr
    assert (clone / ".venv/bin/python").exists()


def test_an_environment_of_a_moved_folder_is_not_used(tmp_path: Path) -> None:
    clone = copy_set_up(tmp_path)
    (clone / ".venv/bin").mkdir(parents=True)
    fake_python(clone / ".venv/bin/python", "Python 3.12.0")
    (clone / ".venv/.location").write_text("/elsewhere\n")
    (clone / ".venv/.stamp-cpu").touch()
    done = make("setup", f"PYTHON={tmp_path / 'none'}", cwd=clone)
    assert done.returncode == 2
    assert "set-up: the folder was moved; preparing .venv again" in done.stderr
    assert not (clone / ".venv").exists()


def copy_set_up(folder: Path) -> Path:
    """Copy what set-up reads into a folder whose name has a blank and an umlaut."""
    clone = folder / "ein Ordner für alles"
    shutil.copytree(ROOT / "requirements", clone / "requirements")
    shutil.copy(ROOT / "Makefile", clone)
    return clone


def fake_python(path: Path, version: str) -> Path:
    """Write a program that says it is `version` and fails everything else it is asked."""
    path.write_text(f'#!/bin/sh\ncase "$2" in *print*) echo {version} ;; *) exit 1 ;; esac\n')
    path.chmod(0o755)
    return path
