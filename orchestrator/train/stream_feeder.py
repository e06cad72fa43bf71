"""How streams reach the replicas of a worker, and which checkpoint they go on from."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import tensorflow as tf

from orchestrator.errors import RestoreError, StorageError
from orchestrator.spec.messages import Notice, WorkerOrder
from orchestrator.spec.plan import RunPlan
from orchestrator.train import store
from orchestrator.train.data import Feed, Feeder, Order, Shard
from orchestrator.train.replica_stream import ReplicaStream
from orchestrator.train.report import Reporter
from orchestrator.train.sources import Source
from orchestrator.train.streams import StreamSource

_FILE = re.compile(r"stream-(\d+)\.npz")
# Keys of which any, in `resume_allow`, lets the number of replicas change.
_REPLICA_KEYS = ("strategy.num_workers", "strategy.devices_per_worker", "strategy.name")


def make_feeder(
    order: WorkerOrder,
    reporter: Reporter,
    source: Source,
    shards: list[Shard],
    *,
    resident: bool,
) -> Feeder | StreamFeeder:
    """Return what prepares the input of this worker's blocks.

    Raises:
        RestoreError: the checkpoint's streams cannot be continued by this plan.
    """
    plan = order.plan
    if not isinstance(source, StreamSource):
        train = plan.config.train
        positions = Order(train.seed, source.num_examples)
        return Feeder(source, positions, shards, train.global_batch_size, resident=resident)

    def tell(text: str) -> None:
        if order.worker == 0:
            reporter.tell(Notice, text=text)

    kept_dir = None if order.restore_from is None else Path(order.restore_from)
    return StreamFeeder(
        source,
        plan.worker_replicas(order.worker),
        [shard.size for shard in shards],
        staging_dir=plan.paths.staging_dir(order.attempt),
        start_step=0 if kept_dir is None else store.step_of(kept_dir),
        kept_dir=None if kept_dir is None else _continued(plan, kept_dir, tell),
        tell=tell,
        progress=reporter.progress,
    )


def _continued(plan: RunPlan, kept_dir: Path, tell: Callable[[str], None]) -> Path | None:
    """Return the checkpoint whose streams are continued; None to begin them anew."""
    files = store.read_manifest(kept_dir)["files"]
    before, after = sum(bool(_FILE.fullmatch(name)) for name in files), plan.num_replicas
    if before == after:
        return kept_dir
    if before == 0:
        raise RestoreError(
            f"checkpoint {kept_dir} holds no streams: the run was started with a source of random "
            "access. Resume it with that source, or start a new run with "
            f"train.init_from={kept_dir}"
        )
    change = f"{before} replicas read the streams of checkpoint {kept_dir}, the plan has {after}"
    if not set(_REPLICA_KEYS) & set(plan.config.resume_allow):
        raise RestoreError(
            f"{change}. A stream is not elastic: which examples a step sees depends on the number "
            "of replicas. Resume with as many (strategy.num_workers, "
            "strategy.devices_per_worker), or let all streams begin anew with "
            "resume_allow=[strategy.num_workers]"
        )
    tell(f"{change}: all streams begin anew, so examples are seen again")
    return None


class StreamFeeder:
    """Prepares the input of blocks from streams, the next one while the present one runs.

    All reading is done by one thread, so a save waits for what is being read.

    Attributes:
        staging_dir: where this attempt writes checkpoints.
    """

    def __init__(
        self,
        source: StreamSource,
        replicas: range,
        batch_sizes: Sequence[int],
        *,
        staging_dir: Path,
        start_step: int = 0,
        kept_dir: Path | None = None,
        tell: Callable[[str], None] = lambda text: None,
        progress: Callable[[str], None] = lambda text: None,
    ):
        """Begin the streams, or continue those of a checkpoint.

        Args:
            source: an open stream.
            replicas: of this worker, among all of the run.
            batch_sizes: examples a step, for each of them.
            staging_dir: where this attempt writes checkpoints; the driver makes it.
            start_step: steps done before.
            kept_dir: the checkpoint of these steps; None to begin.
            tell: takes a sentence that the user should read.
            progress: takes a short text, often, while examples are read again.

        Raises:
            RestoreError: the checkpoint does not fit these streams.
            JobError: a stream that is read again ends too early.
        """
        self.staging_dir = staging_dir
        self._step = start_step
        self._tell = tell
        self._told = False
        self._ahead: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feeder")
        self._streams = [
            ReplicaStream(source.name, dataset, source.features, replica, size)
            for dataset, replica, size in zip(source.datasets, replicas, batch_sizes, strict=True)
        ]
        if kept_dir is not None:
            for stream in self._streams:
                stream.restore(kept_dir, progress)

    def prefetch(self, first_step: int, num_steps: int) -> None:
        """Start to read for a block that will probably be asked for."""
        if num_steps > 0:
            self._ahead = self._thread.submit(self._read, num_steps)

    def take(self, first_step: int, num_steps: int) -> Feed:
        """Return the input of the steps after `first_step`, which were not taken before.

        Raises:
            JobError: a stream has ended.
        """
        assert first_step == self._step, "a stream cannot go back or leave out steps"
        self._finish_reading()
        feed = self._thread.submit(self._take, num_steps).result()
        self._step += num_steps
        return feed

    def save(self, step: int) -> None:
        """Write what the checkpoint of a step needs of this worker's streams, durably.

        The files are whole when this returns, but the checkpoint is not: the chief commits the
        folder, and may do so only after every worker has returned from here.

        Raises:
            StorageError: they cannot be written, or the attempt is over.
        """
        assert step == self._step
        self._finish_reading()
        folder = self.staging_dir / store.checkpoint_name(step)
        try:
            # No parents: the folder of an attempt that is over must not come back.
            folder.mkdir(exist_ok=True)
            reasons = self._thread.submit(self._save, folder).result()
        except (OSError, tf.errors.OpError) as error:
            raise StorageError(
                f"cannot save the streams of step {step}: {error}; every worker writes into the "
                "checkpoint, so runs_dir must be a folder that all of them see"
            ) from error
        if any(reasons) and not self._told:
            self._told = True
            self._tell(
                f"TensorFlow cannot save the state of this stream ({next(filter(None, reasons))}): "
                "a resumed run will read the used examples again and leave them out, which is "
                "exact only if the pipeline gives the same examples in the same order each time"
            )

    def close(self) -> None:
        """End the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _finish_reading(self) -> None:
        """Wait for what is read ahead; raises what reading raised."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.result()

    def _read(self, num_steps: int) -> None:
        for stream in self._streams:
            stream.read(num_steps)

    def _take(self, num_steps: int) -> Feed:
        self._read(num_steps)
        taken = [stream.take(self._step, num_steps) for stream in self._streams]
        return Feed([ids for ids, _ in taken], [features for _, features in taken])

    def _save(self, folder: Path) -> list[str]:
        return [stream.save(folder) for stream in self._streams]
