"""How a worker tells where it is and what went wrong."""

from __future__ import annotations

import contextlib
import math
import os
import re
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import tensorflow as tf

from orchestrator.errors import (
    ExportError,
    JobError,
    OrchestratorError,
    RestoreError,
    StartFailed,
    StorageError,
)
from orchestrator.spec.memory import bytes_text, memory_limit, memory_of
from orchestrator.spec.messages import Beacon, Cause, Failed, Message, Phase, WorkerOrder
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import ClusterName
from orchestrator.spec.secrets import mask_text

_CAUSES: dict[type[OrchestratorError], Cause] = {
    JobError: Cause.job,
    RestoreError: Cause.restore,
    StorageError: Cause.storage,
    StartFailed: Cause.start,
    ExportError: Cause.export,
}
# What survivors of a lost peer see, and the operations that end with theirs; anything else that
# TensorFlow raises, such as a lack of memory or an invalid argument, is the job's own doing.
_COLLATERAL = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.InternalError,
    tf.errors.CancelledError,
)
_BEACON_INTERVAL_S = 1.0
_PACKAGE_DIR = Path(__file__).resolve().parents[1]
_FRAME_IN_TEXT = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>\S+)')


class Stopped(Exception):
    """This worker stops because of something another worker tells about."""


class Reporter:
    """Sends messages of one worker and remembers its phase and step."""

    def __init__(self, order: WorkerOrder, send: Callable[[Message], None]):
        self.phase = Phase.starting
        self.step = 0
        self.clock = time.monotonic
        self._order = order
        self._send = send
        self._detail = ""
        self._gauge: Callable[[], str] | None = None
        # A beacon of the thread must not overtake one that tells of something newer.
        self._lock = threading.Lock()
        # A process of its own has its output in its log; inline the terminal is the driver's.
        self._log: IO[str] | None = None
        if order.plan.config.cluster.name is ClusterName.inline:
            path = order.plan.paths.worker_log(order.attempt, order.worker)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._log = path.open("a", buffering=1)

    def log(self, text: str) -> None:
        """Write into the worker's log."""
        # A full disk takes no lines, and not every name of a file is text; training goes on.
        with contextlib.suppress(OSError, UnicodeError):
            print(text, file=self._log, flush=True)

    def tell(self, kind: type[Message], **fields: Any) -> None:
        """Send a message; worker, attempt and time are filled in."""
        order = self._order
        self._send(kind(worker=order.worker, attempt=order.attempt, time=time.time(), **fields))

    def enter(self, phase: Phase, detail: str = "") -> None:
        """Say that a phase begins; also a line in the worker's log."""
        self.log(f"{phase.value}{': ' if detail else ''}{detail}")
        with self._lock:
            self.phase, self._detail, self._gauge = phase, detail, None
            self.tell(Beacon, phase=phase, step=self.step, detail=detail)

    def progress(self, detail: str) -> None:
        """Say how far the present phase has come; tells the driver with the next beacon."""
        self._detail = detail

    @contextlib.contextmanager
    def within(self, phase: Phase, gauge: Callable[[], str] | None = None) -> Iterator[None]:
        """Be in a phase for a while without a line about it.

        The driver learns of it from the beacons, and so has the patience of that phase. After an
        error the phase stays, to be told with it.

        Args:
            phase: the one that begins here; the present one comes back.
            gauge: returns how far it has come, called once a second in another thread.
        """
        before = (self.phase, self._detail, self._gauge)
        self.phase, self._detail, self._gauge = phase, "", gauge
        yield
        self.phase, self._detail, self._gauge = before

    @contextlib.contextmanager
    def beating(self, interval_s: float = _BEACON_INTERVAL_S) -> Iterator[None]:
        """Send a beacon at every interval, from a thread that needs nothing but the interpreter."""
        is_over = threading.Event()

        def beat() -> None:
            while not is_over.wait(interval_s):
                detail = self._measured()
                with self._lock:
                    self.tell(Beacon, phase=self.phase, step=self.step, detail=detail, begins=False)

        thread = threading.Thread(target=beat, name="beacon", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _measured(self) -> str:
        """Return how far the present phase has come; whatever a gauge raises ends no beacon."""
        if (gauge := self._gauge) is not None:
            with contextlib.suppress(Exception):
                return gauge()
        return self._detail

    def failed(self, error: BaseException) -> None:
        """Tell the whole story of an error: cause, the user's own frame, traceback.

        Without credentials: an error of a database driver may quote the address it was given.
        """
        text = mask_text("".join(traceback.format_exception(error)))
        said = mask_text(one_line(error))
        self.log(text)
        self.tell(
            Failed,
            step=self.step,
            phase=self.phase,
            cause=self._cause(error),
            error=said + out_of_memory(error, self._order.plan, self._order.worker),
            user_frame=mask_text(user_frame(error)),
            traceback=text,
        )

    def _cause(self, error: BaseException) -> Cause:
        if isinstance(error, Stopped):
            return Cause.collateral
        for kind, cause in _CAUSES.items():
            if isinstance(error, kind):
                return cause
        if self.phase in (Phase.starting, Phase.connecting):
            return Cause.start
        if isinstance(error, _COLLATERAL) and self._order.plan.num_workers > 1:
            return Cause.collateral
        return Cause.job


def out_of_memory(error: BaseException, plan: RunPlan, worker: int) -> str:
    """Return what to add to an error that tells of a lack of memory; else nothing."""
    if not isinstance(error, MemoryError | tf.errors.ResourceExhaustedError):
        return ""
    largest, micro_batches = max(plan.replica_batch_sizes), plan.config.train.micro_batches
    halved = min(largest, 2 * micro_batches)
    advice = (
        f"a step needs less with train.micro_batches={halved}, {math.ceil(largest / halved)} "
        f"example(s) at a time instead of {math.ceil(largest / micro_batches)}, or a smaller "
        "train.global_batch_size"
    )
    if "GPU" in str(error):
        return f"; the memory of a GPU of worker {worker} is full: {advice}"
    memory, limit = memory_of(os.getpid()), memory_limit(os.getpid())
    if memory is None or limit is None:
        return f"; {advice}"
    return (
        f"; worker {worker} held {bytes_text(memory.held_bytes)} of memory, at most "
        f"{bytes_text(memory.peak_bytes)}, the limit {limit.source} is "
        f"{bytes_text(limit.num_bytes)}: {advice}"
    )


def folder_gauge(folder: Path) -> Callable[[], str]:
    """Return a gauge of a phase that writes into a folder: how much has come there."""

    def written() -> str:
        total = 0
        # Not rglob, which raises for a folder that is renamed or removed meanwhile (Python 3.11).
        for root, _, names in os.walk(folder):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.stat(os.path.join(root, name)).st_size
        return f"{total / 1e6:,.1f} MB written"

    return written


def user_frame(error: BaseException) -> str:
    """Return the innermost frame in the user's own code: `file:line in function: source line`.

    AutoGraph cuts the traceback and tells the frames in the error's text, so both are searched; of
    an error that explains another one, the other's too.
    """
    frames = []
    for told in filter(None, (error, error.__cause__)):
        for frame in traceback.extract_tb(told.__traceback__):
            frames.append((frame.filename, frame.lineno or 0, frame.name))
        for match in _FRAME_IN_TEXT.finditer(str(told)):
            frames.append((match["file"], int(match["line"]), match["name"]))
    for file, line, name in reversed(frames):
        if _is_users(file):
            return f"{file}:{line} in {name}: {_source_line(file, line)}"
    return ""


def _is_users(file: str) -> bool:
    path = Path(file)
    libraries = (_PACKAGE_DIR, *(Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")))
    return path.is_file() and not any(path.is_relative_to(library) for library in libraries)


def _source_line(file: str, line: int) -> str:
    lines = Path(file).read_text(errors="replace").splitlines()
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""


def one_line(error: BaseException) -> str:
    """Return `Type: message`, without the frames that AutoGraph writes into messages."""
    text = str(error)
    if isinstance(error, OrchestratorError | Stopped):
        return text
    if text.startswith("in user code:"):
        text = text.rstrip().rsplit("\n\n", 1)[-1]
    if text.startswith("Graph execution error:"):
        text = _kernel_message(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    name = type(error).__name__
    first = lines[0] if lines else ""
    return first if first.startswith(f"{name}:") else f"{name}: {first}"


def _kernel_message(text: str) -> str:
    """Return what an op said: in TensorFlow's text it follows the op's traceback."""
    said = [
        line
        for line in text.splitlines()[1:]
        if line and not line[0].isspace() and not line.startswith(("Detected at", "Stack trace"))
    ]
    return said[-1] if said else text
