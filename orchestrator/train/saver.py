"""Writes checkpoints in the background, one at a time, and bears it when that fails."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from orchestrator.errors import StorageError
from orchestrator.spec.config import flatten
from orchestrator.spec.fingerprint import fingerprint
from orchestrator.spec.messages import Notice, Saved, SaveFailed, WorkerOrder
from orchestrator.spec.paths import STAGING_MARK, RunPaths
from orchestrator.train import store
from orchestrator.train.best import Best
from orchestrator.train.checkpoint import local_value, write_bundle
from orchestrator.train.pace import make_pace
from orchestrator.train.rename import remove
from orchestrator.train.report import Reporter


class Saver:
    """Writes checkpoints in the background, one at a time, in the order they were due.

    A save that fails is told and leaves nothing behind; the last good checkpoint stays, and what
    follows is for others to decide.

    Attributes:
        num_failed: saves in a row that have failed.
        error: why the last of them did.
        failed_at: when, by the saver's clock.
    """

    def __init__(
        self,
        paths: RunPaths,
        attempt: int,
        variables: Mapping[str, keras.Variable],
        *,
        keep: int,
        has_streams: bool = False,
        facts: Mapping[str, Any],
        announce: Callable[..., None],
        max_failed: int | None = None,
        before_commit: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Make a saver.

        Args:
            paths: of the run.
            attempt: staging happens in this attempt's folder, which the driver has made, so that
                an attempt that is over cannot commit any more once the folder is renamed away.
            variables: what to save, by key.
            keep: how many checkpoints stay.
            has_streams: whether workers lay the state of streams beside a checkpoint that is due:
                one that is made up for later has weights only.
            facts: what the manifest says besides step and variables.
            announce: called with the fields of `Saved` when a checkpoint is durable, or with those
                of `SaveFailed`.
            max_failed: told with every failure; None for no limit.
            before_commit: called when a checkpoint is written and has not appeared yet.
            clock: seconds from any origin.
        """
        self.num_failed = 0
        self.error = ""
        self.failed_at = 0.0
        self._paths = paths
        self._staging_dir = paths.staging_dir(attempt)
        self._variables = variables
        self._keep = keep
        self._has_streams = has_streams
        self._facts = facts
        self._announce = announce
        self._max_failed = max_failed
        self._before_commit = before_commit
        self._clock = clock
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._pending: Future[None] | None = None
        # Of the best evaluation, where writing it failed: later ones do not replace it.
        self._owed: tuple[int, Mapping[str, tf.Tensor], Mapping[str, Any]] | None = None

    def require_staging(self) -> None:
        """Make sure that this attempt may still save.

        Raises:
            StorageError: it is over.
        """
        require_staging(self._staging_dir)

    def save(
        self,
        step: int,
        best: Best | None = None,
        *,
        evaluation: store.EvaluationState | None = None,
    ) -> None:
        """Take a snapshot of all variables and write it in the background.

        A save that is still under way is waited for: checkpoints never overtake each other.

        Args:
            step: of the variables.
            best: the best evaluation so far, whose checkpoint stays however old it is.
            evaluation: what became of the one after this step, if it was due.

        Raises:
            StorageError: this attempt is over.
        """
        start = time.monotonic()
        self.wait()
        snapshot = self._snapshot()
        stall_s = time.monotonic() - start
        facts = best.facts() if best is not None else {}
        if evaluation is not None:
            facts = {**facts, **evaluation.facts()}
        best_step = best.step if best is not None else None
        self._pending = self._thread.submit(self._write, step, snapshot, stall_s, facts, best_step)

    def _snapshot(self) -> dict[str, tf.Tensor]:
        # A copy on the next write: the values of this step stay, without a pause to copy them.
        return {key: tf.identity(local_value(v)) for key, v in self._variables.items()}

    def is_busy(self, patience_s: float = 0.0) -> bool:
        """Tell whether a save is still under way after so long."""
        if self._pending is None:
            return False
        return not wait_for_futures([self._pending], patience_s).done

    def wait(self) -> None:
        """Wait until the last save has succeeded or failed.

        Raises:
            StorageError: this attempt is over.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Wait, then end the thread."""
        self.wait()
        self._thread.shutdown()

    def owe(self, step: int, best: Best) -> None:
        """Remember the weights of the best evaluation, whose save cannot come about."""
        self._owed = (step, self._snapshot(), best.facts())

    def fail(self, step: int, error: str) -> None:
        """Count a save that cannot come about, and remove what was staged for it."""
        remove(self._staging_dir / store.checkpoint_name(step))
        self.require_staging()
        self.num_failed, self.error, self.failed_at = self.num_failed + 1, error, self._clock()

    def _write(
        self,
        step: int,
        snapshot: Mapping[str, tf.Tensor],
        stall_s: float,
        facts: Mapping[str, Any],
        best_step: int | None,
    ) -> None:
        start = time.monotonic()
        target = self._paths.checkpoints_dir / store.checkpoint_name(step)
        try:
            if step != best_step:
                self._commit_owed(best_step)
            num_bytes = self._commit(step, snapshot, facts, target)
        except (StorageError, OSError, tf.errors.OpError) as error:
            if step == best_step:
                self._owed = (step, snapshot, facts)
            self.fail(step, _one_line(error))
            self._announce(
                SaveFailed,
                step=step,
                error=self.error,
                num_failed=self.num_failed,
                limit=self._max_failed,
            )
            return
        self.num_failed, self.error, self._owed = 0, "", None
        store.prune(self._paths.checkpoints_dir, self._keep, best_step, newest=step)
        wall_s = time.monotonic() - start
        self._announce(
            Saved, step=step, path=str(target), num_bytes=num_bytes, wall_s=wall_s, stall_s=stall_s
        )

    def _commit_owed(self, best_step: int | None) -> None:
        """Write the best evaluation's checkpoint that failed before, unless another is best now."""
        if self._owed is not None and self._owed[0] == best_step:
            start, (step, snapshot, facts) = time.monotonic(), self._owed
            target = self._paths.checkpoints_dir / store.checkpoint_name(step)
            if self._has_streams:
                facts = {**facts, store.WEIGHTS_ONLY: True}
            num_bytes = self._commit(step, snapshot, facts, target)
            wall_s = time.monotonic() - start
            self._announce(
                Saved, step=step, path=str(target), num_bytes=num_bytes, wall_s=wall_s, stall_s=0.0
            )
        self._owed = None

    def _commit(
        self,
        step: int,
        snapshot: Mapping[str, tf.Tensor],
        facts: Mapping[str, Any],
        target: Path,
    ) -> int:
        staged = self._staging_dir / store.checkpoint_name(step)
        # The state of streams may lie there already. No parents: the folder of an attempt that is
        # over must not come back.
        staged.mkdir(exist_ok=True)
        described = write_bundle(staged, snapshot)
        manifest = {
            "step": step,
            **self._facts,
            **facts,
            "time": time.time(),
            "variables": described,
        }
        if self._before_commit is not None:
            self._before_commit()
        return store.commit(staged, target, manifest, check=self.require_staging)


def owes_evaluation(order: WorkerOrder) -> bool:
    """Tell whether a worker begins where the evaluation of that step is still to be made."""
    if order.restore_from is None:
        return False
    return store.evaluation_of(Path(order.restore_from)) is store.EvaluationState.owed


def make_saver(
    order: WorkerOrder,
    reporter: Reporter,
    variables: Mapping[str, keras.Variable],
    versions: Mapping[str, str],
    *,
    has_streams: bool = False,
) -> Saver | None:
    """Return what writes checkpoints: the chief's; None for other workers.

    Raises:
        StorageError: the run begins, and its checkpoints do not fit on the disk.
    """
    if order.worker > 0:
        return None
    plan, checkpoint = order.plan, order.plan.config.checkpoint
    pace = make_pace(plan, order.worker)
    too_small = _lack_of_space(
        plan.paths, variables, checkpoint.keep + (plan.config.best.metric is not None)
    )
    if too_small is not None and order.restore_from is None:
        raise StorageError(too_small)
    if too_small is not None:
        # A run that lives goes on: somebody may make room before the next save.
        reporter.tell(Notice, text=too_small)
    return Saver(
        plan.paths,
        order.attempt,
        variables,
        keep=checkpoint.keep,
        has_streams=has_streams,
        max_failed=checkpoint.max_failed_saves,
        facts={
            "run": plan.run,
            "attempt": order.attempt,
            "config_fingerprint": fingerprint(flatten(plan.config)),
            "versions": versions,
        },
        announce=reporter.tell,
        before_commit=pace.before_commit if pace is not None else None,
    )


def require_staging(staging_dir: Path) -> None:
    """Make sure that an attempt may still write into its staging folder.

    Raises:
        StorageError: the driver has taken it away: the attempt is over.
    """
    if not (staging_dir / STAGING_MARK).is_file():
        raise StorageError(
            f"the folder {staging_dir} is gone: this attempt is over, or its worker does not see "
            "the run folder that the driver sees; runs_dir must be the same folder on every node"
        )


def _lack_of_space(
    paths: RunPaths, variables: Mapping[str, keras.Variable], num_kept: int
) -> str | None:
    """Return what to say if the checkpoints that will be kept do not fit on the disk, or None.

    Args:
        paths: of the run.
        variables: what is saved.
        num_kept: checkpoints that stay; one more is being written.
    """
    each = sum(_num_bytes(variable) for variable in variables.values())
    needed = each * (num_kept + 1)
    files = paths.checkpoints_dir.glob("step-*/*")
    free = shutil.disk_usage(paths.checkpoints_dir).free + sum(f.lstat().st_size for f in files)
    if free >= needed:
        return None
    return (
        f"{paths.checkpoints_dir} has room for {free / 1e6:,.0f} MB of checkpoints; "
        f"{num_kept} that are kept and one being written need {needed / 1e6:,.0f} MB "
        f"({each / 1e6:,.0f} MB each): make room, lower checkpoint.keep, or set runs_dir to "
        "another disk"
    )


def _num_bytes(variable: keras.Variable) -> int:
    dtype = tf.as_dtype(variable.dtype)
    return int(dtype.size * tf.TensorShape(variable.shape).num_elements())


def _one_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
