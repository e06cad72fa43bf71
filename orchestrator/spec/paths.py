"""Every file and folder of a run, named once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# The folder that holds this package, `conf/` and `jobs/`.
PROJECT_DIR = Path(__file__).resolve().parents[2]
# In every staging folder: the driver has made it. A library that makes missing folders, such as
# TensorFlow for an attempt that is over, makes them without.
STAGING_MARK = ".made-by-the-driver"


def typed_path(text: str, cwd: Path) -> Path:
    """Return the absolute path that a user has typed.

    A shell that is not asked to, such as make's, leaves a `~` behind an equals sign.
    """
    return (cwd / os.path.expanduser(text)).resolve()


@dataclass(frozen=True, slots=True)
class RunPaths:
    """The run folder `runs/<job>/<run>/` and what lies in it.

    Attributes:
        root: absolute path of the run folder; the same on every node.
    """

    root: Path

    @property
    def config(self) -> Path:
        """The resolved configuration, YAML."""
        return self.root / "config.yaml"

    @property
    def overrides(self) -> Path:
        """The overrides as typed, one a line."""
        return self.root / "overrides.txt"

    @property
    def plan(self) -> Path:
        """What `make plan` prints for this run."""
        return self.root / "plan.txt"

    @property
    def journal(self) -> Path:
        """The durable log: one checksummed JSON record a line."""
        return self.root / "journal.jsonl"

    @property
    def report(self) -> Path:
        """The run on one page, HTML."""
        return self.root / "report.html"

    @property
    def plots_dir(self) -> Path:
        """The report's plots, PNG."""
        return self.root / "plots"

    @property
    def lease(self) -> Path:
        """Locked by the one driver that holds this run."""
        return self.root / ".lease"

    @property
    def stop_request(self) -> Path:
        """Asks the driver to stop; it is removed by the driver, and seldom there."""
        return self.root / ".stop"

    @property
    def checkpoints_dir(self) -> Path:
        """Holds `step-00001200/` folders and one staging folder an attempt."""
        return self.root / "checkpoints"

    def staging_dir(self, attempt: int) -> Path:
        """Where an attempt writes checkpoints before they are renamed into place."""
        return self.checkpoints_dir / f".attempt-{attempt}"

    @property
    def export_dir(self) -> Path:
        """The SavedModel, its golden batch and the packaged MLflow model."""
        return self.root / "export"

    def export_staging_dir(self, attempt: int) -> Path:
        """Where an attempt writes its export before it is renamed into place."""
        return self.root / f".export-{attempt}"

    @property
    def saved_model_dir(self) -> Path:
        """The exported SavedModel."""
        return self.export_dir / "saved_model"

    @property
    def golden(self) -> Path:
        """Inputs and the live model's answers, NumPy .npz, for the proof of the export."""
        return self.export_dir / "golden.npz"

    @property
    def mlflow_model_dir(self) -> Path:
        """The SavedModel packaged as an MLflow model."""
        return self.export_dir / "mlflow_model"

    @property
    def proof(self) -> Path:
        """What the clean process found out about the export, JSON."""
        return self.export_dir / "proof.json"

    @property
    def model_summary(self) -> Path:
        """The model's layers and parameters, as Keras prints them."""
        return self.root / "model.txt"

    @property
    def code_dir(self) -> Path:
        """Copies of the job's source files as the run was last started with them."""
        return self.root / "code"

    def code_diff(self, attempt: int) -> Path:
        """How the job's source files had changed when an attempt was the next one."""
        return self.root / f"code-before-attempt-{attempt}.diff"

    def uncommitted(self, attempt: int) -> Path:
        """What of the code was in no commit when an attempt was the next one."""
        return self.root / f"uncommitted-before-attempt-{attempt}.diff"

    @property
    def diffs(self) -> list[Path]:
        """Both kinds of differences, of all starts."""
        return sorted(self.root.glob("*-before-attempt-*.diff"))

    @property
    def packages(self) -> Path:
        """What was installed where the driver ran, one package and version a line."""
        return self.root / "packages.txt"

    @property
    def compile_choice(self) -> Path:
        """What `train.compile=auto` has chosen, and where, JSON."""
        return self.root / "compile.json"

    @property
    def profile_dir(self) -> Path:
        """What TensorFlow's profiler wrote; TensorBoard reads it."""
        return self.root / "profile"

    @property
    def chaos_dir(self) -> Path:
        """Files that ask paced workers to stall or to hold a save; see train/pace.py."""
        return self.root / ".chaos"

    @property
    def logs_dir(self) -> Path:
        """Logs of the driver and of each worker of each attempt."""
        return self.root / "logs"

    @property
    def driver_log(self) -> Path:
        """Everything the driver did, with times."""
        return self.logs_dir / "driver.log"

    def worker_log(self, attempt: int, worker: int) -> Path:
        """Standard output and error of one worker in one attempt."""
        return self.logs_dir / f"attempt-{attempt}" / f"worker-{worker}.log"

    def worker_stacks(self, attempt: int, worker: int) -> Path:
        """Python stacks of one worker, written on request."""
        return self.logs_dir / f"attempt-{attempt}" / f"worker-{worker}.stacks"


SWEEPS = "sweeps"  # the folder in runs_dir that no job can be called by


@dataclass(frozen=True, slots=True)
class SweepPaths:
    """The folder `runs/sweeps/<sweep>/` and what lies in it; the children's runs lie elsewhere.

    Attributes:
        root: absolute path of the folder.
    """

    root: Path

    @property
    def sweep(self) -> Path:
        """What the sweep was asked for and its children, JSON; written once."""
        return self.root / "sweep.json"

    def config(self, child: str) -> Path:
        """The configuration of a child as it was at the first call, YAML."""
        return self.root / "configs" / f"{child}.yaml"

    def log(self, child: str) -> Path:
        """What the commands that trained a child have printed."""
        return self.root / "logs" / f"{child}.log"

    @property
    def stopped(self) -> Path:
        """Which children were stopped for being behind the others: a journal."""
        return self.root / "stopped.jsonl"

    @property
    def table(self) -> Path:
        """All children with their results, Markdown."""
        return self.root / "table.md"

    @property
    def csv(self) -> Path:
        """The same as comma-separated values."""
        return self.root / "table.csv"

    @property
    def plot(self) -> Path:
        """The children's evaluations over their steps, PNG."""
        return self.root / "evaluations.png"

    @property
    def recorded(self) -> Path:
        """Is there when MLflow has all of a sweep that is done."""
        return self.root / ".recorded"

    def run(self, job: str, name: str) -> RunPaths:
        """Return the run of a child."""
        return RunPaths(self.root.parents[1] / job / name)
