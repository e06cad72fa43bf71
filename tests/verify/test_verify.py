"""`verify` proves what holds and finds what does not, in real worker processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import pytest

from orchestrator.control.launcher import Zygote
from orchestrator.errors import ConfigError, ExitCode, RestoreError
from orchestrator.spec.config import load_config
from orchestrator.spec.schema import OptimizerName
from orchestrator.verify.run import verify, verify_with

ROOT = Path(__file__).parents[2]
MINE = Path(__file__).parent / "mine"
OPTIMIZERS = [name.value for name in OptimizerName if name.is_proven]


@dataclass(frozen=True)
class Said:
    """How a verification ended and what it printed."""

    code: ExitCode
    out: str

    @property
    def rows(self) -> list[str]:
        """The lines of the tables."""
        return [line for line in self.out.splitlines() if re.search(r"(proven|DIFFERS) ", line)]


Verify = Callable[..., Said]
HALF = ("precision.policy=mixed_float16", "precision.initial_loss_scale=1024", "verify.steps=2")


@pytest.fixture
def run(zygote: Zygote, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Verify:
    """Verify a job of `mine`, as the command does after it has read its arguments."""

    def run_job(job: str, *overrides: str) -> Said:
        config = load_config([f"job={job}", *overrides], MINE)
        code = verify_with(config, zygote, tmp_path)
        said = Said(code, capsys.readouterr().out)
        left = list((tmp_path / "runs" / job).iterdir())
        assert bool(left) == (code is ExitCode.DIFFERENCE), said.out
        return said

    return run_job


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_proven(run: Verify, optimizer: str) -> None:
    cuts = "[uneven]" if optimizer == "adam" else "[mirrored]"
    said = run("small", f"optimizer={optimizer}", f"verify.variants={cuts}", "verify.steps=5")
    assert said.code is ExitCode.DONE, said.out
    assert f"{optimizer} in float32, 3 steps" in said.out
    assert len(said.rows) == 2


def test_batch_normalisation_and_dropout_are_proven_as_what_they_are_replaced_by(
    run: Verify,
) -> None:
    said = run("normalised", "verify.variants=[mirrored,micro_batches,uneven]")
    assert said.code is ExitCode.DONE, said.out
    assert "dropout and noise off in dropout, gaussian_noise" in said.out
    assert "BatchNorm synchronised in batch_normalization" in said.out
    # Micro-batches are left out, and rounding noise is given no chance.
    assert len(said.rows) == 4 and "4 micro-batches" not in said.out
    assert "adam in float64, 3 steps" in said.out


def test_an_embedding_whose_gradients_are_slices_is_proven(run: Verify) -> None:
    said = run("embedded", "verify.variants=[multi_worker,uneven]", "verify.steps=4")
    assert said.code is ExitCode.DONE, said.out
    assert len(said.rows) == 4


def test_two_optimizers_and_gradients_of_the_job_are_proven(run: Verify) -> None:
    said = run("duel", "verify.variants=[mirrored,micro_batches]")
    assert said.code is ExitCode.DONE, said.out
    assert len(said.rows) == 4


@pytest.mark.parametrize(
    ("fault", "cut", "step", "what"),
    [
        ("keras_clips", "uneven", 1, "the variables differ"),
        ("reduced_twice", "mirrored", 1, "the variables differ"),
        ("lost_shard", "mirrored", 1, "other examples were used"),
        ("replica_mean", "mirrored", 1, "the variables differ"),
        ("tape_is_blind", "mirrored", 1, "the variables differ"),
    ],
)
def test_a_planted_fault_is_found_with_its_step_and_a_variable(
    run: Verify, fault: str, cut: str, step: int, what: str
) -> None:
    said = run("small", f"job.args.fault={fault}", f"verify.variants=[{cut}]", "verify.steps=20")
    assert said.code is ExitCode.DIFFERENCE, said.out
    assert f"first at step {step}: {what}" in said.out
    assert re.search(r"after step 1 the variable model/\d:\S+/(kernel|bias) is \S+ off", said.out)


def test_a_job_in_float16_is_proven_with_its_loss_scale(run: Verify) -> None:
    said = run("small", *HALF, "verify.variants=[uneven]")
    assert said.code is ExitCode.DONE, said.out
    title = "adam in float32 with loss scale 1024 against 1, overflow in step 2, 3 steps"
    assert f"scaled: {title}" in said.out and f"\n{title}" in said.out
    assert len(said.rows) == 3


@pytest.mark.parametrize(
    ("fault", "step"),
    [("never_unscaled", 1), ("first_scale_stays", 3), ("decided_by_the_first_replica", 2)],
)
def test_a_wrong_loss_scale_is_found(run: Verify, fault: str, step: int) -> None:
    said = run("small", f"job.args.fault={fault}", *HALF, "verify.variants=[mirrored]")
    assert said.code is ExitCode.DIFFERENCE, said.out
    assert [row.split()[-2] for row in said.rows] == ["proven", "proven", "DIFFERS"]
    assert f"scaled, 2 replicas: 8+8: first at step {step}: " in said.out


def test_dropout_that_stays_on_is_found(run: Verify) -> None:
    said = run("normalised", "job.args.fault=dropout_stays", "verify.variants=[mirrored]")
    assert said.code is ExitCode.DIFFERENCE, said.out
    assert "NOT off: dropout, gaussian_noise draws random numbers" in said.out
    assert re.search(r"first at step 1: .* the variable model/\d+:\S+ is", said.out)


def test_random_numbers_that_cannot_be_switched_off_are_told(run: Verify) -> None:
    said = run("personal", "verify.variants=[mirrored]", "verify.steps=2")
    assert said.code is ExitCode.DIFFERENCE
    assert "NOT off: shaky draws random numbers" in said.out


def test_a_variant_that_a_job_leaves_out_is_no_proof(run: Verify) -> None:
    with pytest.raises(ConfigError, match=r"=\[micro_batches\]: .* is left to compare"):
        run("normalised", "verify.variants=[micro_batches]", "verify.steps=2")


def test_all_begin_with_the_same_initial_weights(run: Verify, tmp_path: Path) -> None:
    with pytest.raises(RestoreError, match=r"train\.init_from=nothing: neither a run in"):
        run("small", "train.init_from=nothing")
    # Below the folder that the command was called in, which is not that of its workers.
    hidden = keras.layers.Dense(16, activation="relu")  # as the model of `small` is
    model = keras.Sequential([keras.layers.Input((8,)), hidden, keras.layers.Dense(3)])
    model.save_weights(str(tmp_path / "first.weights.h5"))
    few = ("verify.variants=[mirrored]", "verify.steps=2")
    said = run("small", "train.init_from=first.weights.h5", *few)
    assert said.code is ExitCode.DONE, said.out


@pytest.mark.parametrize("override", ["cluster=existing", "resume=latest", "verify.variants=[]"])
def test_what_cannot_be_compared_here_is_refused(override: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        verify(["job=small", override], MINE, tmp_path)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("fault", "code"),
    [("", 0), pytest.param("reduced_twice", 1, marks=pytest.mark.thorough)],
)
def test_the_command_tells_by_its_exit_code(fault: str, code: int, tmp_path: Path) -> None:
    arguments = ["job=small", f"--config-dir={MINE}"]
    if fault:
        arguments += [f"job.args.fault={fault}", "verify.variants=[multi_worker]"]
        arguments += ["verify.steps=20"]
    done = subprocess.run(
        [sys.executable, "-m", "orchestrator", "verify", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == code, done.stdout + done.stderr
    if fault:
        assert done.stderr.splitlines()[-1] == "exit code 1: a difference was found"
        assert (
            "exact, 2 workers, clipped: 8+8: first at step 1: the variables differ" in done.stdout
        )
    else:
        assert len(Said(ExitCode.DONE, done.stdout).rows) == 8
