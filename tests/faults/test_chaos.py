"""`chaos` finds a protection that is switched off, and nothing where all are on."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.chaos.netns import why_not_here
from orchestrator.chaos.run import chaos, shortened, why_no_hosts
from orchestrator.control import folders, worker_process
from orchestrator.control.launcher import Zygote
from orchestrator.errors import ExitCode, OrchestratorError
from orchestrator.spec.chaos import FaultName
from orchestrator.spec.config import load_config
from tests.faults.chaos_rig import MINE, CutOff, Here, planted
from tests.plans import tiny_config

ROOT = Path(__file__).parents[2]
QUICK = ("chaos.step_ms=5", "train.block_s=0.1", "train.eval_every_steps=null")
Run = Callable[..., tuple[ExitCode, str]]


@pytest.fixture
def run(zygote: Zygote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """Put the job of `mine` through chaos, as the command does, without Ray and MLflow."""

    def run_job(*overrides: str, kind: type[Here] = Here) -> tuple[ExitCode, str]:
        make_command = planted(kind, zygote)
        code = chaos(["job=shaken", *QUICK, *overrides], MINE, tmp_path, make_command)
        left = list((tmp_path / "runs" / "shaken").iterdir())
        out = capsys.readouterr().out
        assert bool(left) == (code is ExitCode.DIFFERENCE), out
        return code, out

    return run_job


def test_nothing_differs_where_every_protection_is_on(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")  # a machine without iproute2
    code, out = run("chaos.faults=[kill,damaged_checkpoint,kill_in_save,cut]")
    assert code is ExitCode.DONE, out
    assert re.search(r"kill +\d+ +\d+\.\d\d +\d+\.\d\d +\d+\.\d\d +\d+ +the same", out), out
    assert re.search(r"cut +not run: (ip, nsenter, .* not installed|.* need root)", out), out
    assert "3 faults, and the same weights and record" in out


@pytest.mark.parametrize(
    ("fault", "what"),
    [
        ("seeds_of_the_process", "losses: "),
        ("one_example_late", "examples: other ones were used"),
    ],
)
def test_a_restart_that_goes_on_otherwise_is_found(run: Run, fault: str, what: str) -> None:
    code, out = run(f"job.args.fault={fault}", "chaos.faults=[kill]")
    assert code is ExitCode.DIFFERENCE, out
    assert re.search(r"kill .* DIFFERS", out), out
    assert what in out
    assert "weights: the final checkpoints have another SHA-256" in out


def test_a_checkpoint_that_is_seen_before_it_is_whole_is_found(run: Run) -> None:
    code, out = run("job.args.fault=seen_before_it_is_whole", "chaos.faults=[kill_in_save]")
    assert code is ExitCode.DIFFERENCE, out
    said = r"kill_in_save .* FAILED: half a checkpoint was left: step-\d+ has no manifest.json"
    assert re.search(said, out), out


@pytest.mark.parametrize("is_buried", [pytest.param(True, marks=pytest.mark.thorough), False])
def test_a_chief_that_outlives_its_attempt_can_commit_nothing_but_without_fencing(
    run: Run, monkeypatch: pytest.MonkeyPatch, is_buried: bool
) -> None:
    # Its agent is frozen with it.
    monkeypatch.setattr(worker_process, "_STOPPED_S", math.inf)
    if not is_buried:
        monkeypatch.setattr(folders, "_take_away", lambda path: None)
    patience = "recovery.step_patience_s=3"
    code, out = run("chaos.faults=[stale_chief]", patience, kind=CutOff)
    committed = "attempt 1 committed step-" in out
    assert committed is not is_buried, out
    # Here it cannot be ended; that it outlives its attempt is told, too.
    assert committed or "the chief of attempt 1 outlived it" in out
    assert code is ExitCode.DIFFERENCE


def test_the_command_tells_by_its_exit_code(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "orchestrator", "chaos", "job=shaken", f"--config-dir={MINE}"),
            *("chaos.faults=[kill]", "chaos.report=report.md", *QUICK),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 faults, and the same weights and record" in done.stdout
    assert "## shaken\n" in (tmp_path / "report.md").read_text()


@pytest.mark.thorough
def test_a_cut_cable_and_a_lost_host_leave_the_same_as_no_fault(tmp_path: Path) -> None:
    if reason := why_not_here():
        pytest.skip(reason)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "orchestrator", "chaos", "job=shaken", f"--config-dir={MINE}"),
            *("chaos.faults=[cut,node_loss]", "chaos.step_ms=20"),
        ],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=290,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    for fault in ("cut", "node_loss"):
        row = rf"{fault} +\d+ +\d+\.\d+ +\d+\.\d+ +\d+\.\d+ +\d+ +the same"
        assert re.search(row, done.stdout), done.stdout
    assert "2 faults, and the same weights and record" in done.stdout


def test_a_job_is_shortened_to_the_steps_that_faults_take(tmp_path: Path) -> None:
    config = load_config(["job=code_lm"])
    assert config.schedule.warmup_steps == 100
    weights = tmp_path / "a b.weights.h5"
    weights.touch()
    config.train.init_from = weights.name
    short = load_config(["job=code_lm", *shortened(config, 100, tmp_path)])
    assert (short.train.steps, short.schedule.warmup_steps) == (100, 50)
    assert short.train.init_from == str(weights)
    assert "warmup" not in "".join(shortened(config, 101, tmp_path))


def test_faults_of_hosts_need_several_workers() -> None:
    assert why_no_hosts(tiny_config(chaos__full=True)).startswith("needs strategy=multi_worker")
    assert why_no_hosts(tiny_config(chaos__faults=[FaultName.kill])) == ""


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("chaos.faults=[kil]", "did you mean kill?"),
        ("chaos.faults=[]", "name at least one"),
        ("chaos.report=.", "is a folder; name a Markdown file"),
        ("chaos.report=", "is a folder; name a Markdown file"),
        ("chaos.report=/dev/null/report.md", "/dev/null is no folder"),
        (f"chaos.report={'a' * 300}.md", "File name too long"),
        (f"chaos.report={sys.executable}", "can't decode"),
        ("train.init_from=nothing", "neither a run in"),
        ("schedule.warmup_steps=5000", "is not shorter than the 360 steps that chaos trains"),
        ("chaos.seed=-1", "at least 0"),
        ("chaos.step_ms=0", "greater than 0"),
        ("cluster=existing", "leave it out"),
        ("resume=latest", "runs of its own"),
        ("checkpoint.every_steps=null", "needs checkpoints"),
    ],
)
def test_what_cannot_be_done_is_refused(override: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(OrchestratorError, match=re.escape(said)):
        chaos(["job=shaken", override], MINE, tmp_path)
    assert not (tmp_path / "runs").exists()
