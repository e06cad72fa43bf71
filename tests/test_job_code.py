"""Which files a job is made of, and what is said when they have changed."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.job_code import job_sources, keep_code
from orchestrator.spec.paths import PROJECT_DIR, RunPaths


def write(folder: Path, **files: str) -> list[str]:
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return [str(PROJECT_DIR), str(folder)]


def test_a_jobs_sources_are_its_module_and_what_that_imports_of_its_own(tmp_path: Path) -> None:
    dirs = write(
        tmp_path,
        mine="import numpy\nimport parts.layers\nfrom orchestrator.train.job import Job\n",
        parts__init="",
        parts__layers="from . import sizes\nfrom .more import x\n",
        parts__sizes="import mine\n",
        parts__more="x = 1\n",
        unused="",
    )
    found = job_sources("mine.Mine", dirs)
    assert sorted(found) == ["mine.py", "parts/layers.py", "parts/more.py", "parts/sizes.py"]


def test_a_shipped_jobs_sources_are_found(tmp_path: Path) -> None:
    assert "jobs/mnist.py" in job_sources("jobs.mnist.Mnist", [str(PROJECT_DIR)])


def test_a_file_with_a_mistake_is_kept_too(tmp_path: Path) -> None:
    assert list(job_sources("mine.Mine", write(tmp_path, mine="def ("))) == ["mine.py"]


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    (tmp_path / "run").mkdir()
    return RunPaths(tmp_path / "run")


def test_what_has_not_changed_is_not_told(tmp_path: Path, paths: RunPaths) -> None:
    dirs = write(tmp_path, mine="a = 1\n")
    for attempt in (1, 2):
        assert keep_code(job_sources("mine.Mine", dirs), paths, attempt) == ""
    assert (paths.code_dir / "mine.py").read_text() == "a = 1\n"
    assert not paths.code_diff(2).exists()


def test_a_change_is_told_in_twenty_lines_and_kept_whole(tmp_path: Path, paths: RunPaths) -> None:
    dirs = write(tmp_path, mine="import other\na = 1\n", other="")
    keep_code(job_sources("mine.Mine", dirs), paths, 1)
    write(tmp_path, mine="".join(f"a = {number}\n" for number in range(50)))
    told = keep_code(job_sources("mine.Mine", dirs), paths, 4)
    assert told.startswith("the job's code has changed since the run was last started")
    assert str(paths.code_diff(4)) in told
    assert "  -import other" in told.splitlines()
    # The sentence, twenty lines, and how many more there are.
    assert len(told.splitlines()) == 22
    assert told.endswith("more lines")
    whole = paths.code_diff(4).read_text()
    assert "+a = 49" in whole and "+++ /dev/null" not in whole
    # The next start is compared with this one.
    assert keep_code(job_sources("mine.Mine", dirs), paths, 5) == ""


def test_a_run_that_kept_no_code_is_not_compared(tmp_path: Path, paths: RunPaths) -> None:
    assert keep_code(job_sources("mine.Mine", write(tmp_path, mine="a = 1\n")), paths, 3) == ""
