"""What is refused, and what is only said, before the first worker is started."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.control.preflight import run_checks, small_shared_memory
from orchestrator.errors import ClusterError, ConfigError, StorageError
from orchestrator.spec.config import list_group, load_config
from orchestrator.spec.plan import Host, RunPlan, make_plan
from orchestrator.spec.schema import ClusterName
from tests.plans import tiny_plan

ON_A_CLUSTER = {"cluster__name": ClusterName.existing}


@pytest.fixture(autouse=True)
def nobodys_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no token that somebody's Ray has left on this machine be found."""
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)


def plan_with_folder(folder: Path, **changes: Any) -> RunPlan:
    plan = tiny_plan(folder, **changes)
    plan.paths.root.mkdir(parents=True)
    return plan


def plan_without_folder(folder: Path, **changes: Any) -> RunPlan:
    """Return a plan whose run folder is a file, which root cannot write into either."""
    plan = tiny_plan(folder, **changes)
    plan.paths.root.parent.mkdir(parents=True)
    plan.paths.root.touch()
    return plan


def test_a_sound_plan_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    plan = plan_with_folder(tmp_path)
    run_checks(plan)
    assert list(plan.paths.root.iterdir()) == []


@pytest.mark.parametrize("job", list_group("job"))
def test_no_shipped_job_is_refused(job: str, tmp_path: Path) -> None:
    config = load_config([f"job={job}"])
    plan = make_plan(config, run="a-run", host=Host(num_cpus=2, num_gpus=0), cwd=tmp_path)
    plan.paths.root.mkdir(parents=True)
    run_checks(plan)


@pytest.mark.parametrize("left", [".probe-1", ".probe-2"])
def test_what_a_start_that_was_killed_has_left_is_no_obstacle(tmp_path: Path, left: str) -> None:
    plan = plan_with_folder(tmp_path)
    (plan.paths.root / left).mkdir()
    (plan.paths.root / left / "file").write_bytes(b"x")
    run_checks(plan)
    assert list(plan.paths.root.iterdir()) == []


def test_a_run_folder_that_cannot_be_written_is_refused_with_the_key(tmp_path: Path) -> None:
    plan = plan_without_folder(tmp_path)
    with pytest.raises(StorageError) as refusal:
        run_checks(plan)
    assert f"{plan.paths.root} cannot be written" in str(refusal.value)
    assert "runs_dir" in str(refusal.value)


def test_data_that_is_not_there_is_refused_with_the_key(tmp_path: Path) -> None:
    plan = plan_with_folder(tmp_path, data__path="missing")
    with pytest.raises(ConfigError) as refusal:
        run_checks(plan)
    assert f"data.path={tmp_path / 'missing'}" in str(refusal.value)


def test_data_that_cannot_be_looked_at_is_refused_with_the_reason(tmp_path: Path) -> None:
    plan = plan_with_folder(tmp_path, data__path="a" * 300)
    with pytest.raises(ConfigError, match="it cannot be looked at: File name too long"):
        run_checks(plan)


def test_data_that_is_there_passes(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    run_checks(plan_with_folder(tmp_path, data__path="mine"))


def test_data_on_the_nodes_of_a_cluster_need_not_be_here(tmp_path: Path) -> None:
    run_checks(plan_with_folder(tmp_path, data__path="missing", **ON_A_CLUSTER))


def test_all_refusals_are_told_together_as_the_first_ones_kind(tmp_path: Path) -> None:
    plan = plan_without_folder(tmp_path, data__path="missing")
    with pytest.raises(StorageError) as refusal:
        run_checks(plan)
    folder, data = str(refusal.value).splitlines()
    assert "cannot be written" in folder
    assert "data.path=" in data


def test_a_home_that_is_missing_is_said_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    said = run_checks(plan_with_folder(tmp_path))
    assert any(text.startswith("HOME is missing") for text in said)


@pytest.fixture
def few_files() -> Iterator[None]:
    """Let this process open few files, as a default shell does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.usefixtures("few_files")
def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(tmp_path: Path) -> None:
    said = run_checks(plan_with_folder(tmp_path))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert soft > 1024 or hard == 1024
    assert any("ulimit -n" in text for text in said) == (soft < 4096)


def test_a_token_that_others_can_read_is_refused_with_its_mode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = tmp_path / "token"
    token.write_text("secret words")
    token.chmod(0o644)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    with pytest.raises(ClusterError) as refusal:
        run_checks(plan_with_folder(tmp_path, **ON_A_CLUSTER))
    assert f"the token file {token} has mode 0644" in str(refusal.value)
    assert f"chmod 600 {token}" in str(refusal.value)
    assert "secret words" not in str(refusal.value)
    token.chmod(0o600)
    run_checks(tiny_plan(tmp_path, **ON_A_CLUSTER))


def test_a_token_file_that_is_missing_is_refused_with_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nothing"))
    with pytest.raises(ClusterError) as refusal:
        run_checks(plan_with_folder(tmp_path, **ON_A_CLUSTER))
    assert f"{tmp_path / 'nothing'} cannot be read" in str(refusal.value)
    assert "RAY_AUTH_TOKEN_PATH" in str(refusal.value)


@pytest.fixture
def open_umask() -> Iterator[None]:
    """Let everybody write what this process makes."""
    kept = os.umask(0)
    yield
    os.umask(kept)


@pytest.mark.usefixtures("open_umask")
def test_files_that_everybody_may_change_are_said(tmp_path: Path) -> None:
    said = run_checks(plan_with_folder(tmp_path))
    assert any(text.startswith("umask is 000") for text in said)


def test_a_small_shared_memory_is_said_with_its_size() -> None:
    found = small_shared_memory(64 * 2**20, "")
    assert found is not None and found.seen == "/dev/shm has 64 MiB"
    assert small_shared_memory(2**30, "") is None
