"""How a worker tells where it is and what went wrong."""

from __future__ import annotations

import contextlib
import re
import sysconfig
import time
import traceback
from collections.abc import Callable
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
from orchestrator.spec.messages import Beacon, Cause, Failed, Message, Phase, WorkerOrder
from orchestrator.spec.schema import ClusterName

_CAUSES: dict[type[OrchestratorError], Cause] = {
    JobError: Cause.job,
    RestoreError: Cause.restore,
    StorageError: Cause.storage,
    StartFailed: Cause.start,
    ExportError: Cause.export,
}
# What survivors of a lost peer see; anything else TensorFlow raises is the job's own doing.
_COLLATERAL = (
    tf.errors.UnavailableError,
    tf.errors.DeadlineExceededError,
    tf.errors.AbortedError,
    tf.errors.InternalError,
    tf.errors.CancelledError,
)
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
        # A process of its own has its output in its log; inline the terminal is the driver's.
        self._log: IO[str] | None = None
        if order.plan.config.cluster.name is ClusterName.inline:
            path = order.plan.paths.worker_log(order.attempt, order.worker)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._log = path.open("a", buffering=1)

    def log(self, text: str) -> None:
        """Write into the worker's log."""
        with contextlib.suppress(OSError):  # a full disk takes no lines; training goes on
            print(text, file=self._log, flush=True)

    def tell(self, kind: type[Message], **fields: Any) -> None:
        """Send a message; worker, attempt and time are filled in."""
        order = self._order
        self._send(kind(worker=order.worker, attempt=order.attempt, time=time.time(), **fields))

    def enter(self, phase: Phase, detail: str = "") -> None:
        """Say that a phase begins; also a line in the worker's log."""
        self.phase = phase
        self.log(f"{phase.value}{': ' if detail else ''}{detail}")
        self.tell(Beacon, phase=phase, step=self.step, detail=detail)

    def progress(self, detail: str) -> None:
        """Say how far the present phase has come."""
        self.tell(Beacon, phase=self.phase, step=self.step, detail=detail)

    def failed(self, error: BaseException) -> None:
        """Tell the whole story of an error: cause, the user's own frame, traceback."""
        text = "".join(traceback.format_exception(error))
        self.log(text)
        self.tell(
            Failed,
            step=self.step,
            phase=self.phase,
            cause=self._cause(error),
            error=_one_line(error),
            user_frame=user_frame(error),
            traceback=text,
        )

    def _cause(self, error: BaseException) -> Cause:
        if isinstance(error, Stopped):
            return Cause.collateral
        for kind, cause in _CAUSES.items():
            if isinstance(error, kind):
                return cause
        if isinstance(error, _COLLATERAL) and self._order.plan.num_workers > 1:
            return Cause.start if self.phase is Phase.connecting else Cause.collateral
        if self.phase in (Phase.starting, Phase.connecting):
            return Cause.start
        return Cause.job


def user_frame(error: BaseException) -> str:
    """Return the innermost frame in the user's own code: `file:line in function: source line`.

    AutoGraph cuts the traceback and tells the frames in the error's text, so both are searched.
    """
    frames = [
        (frame.filename, frame.lineno or 0, frame.name)
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    for match in _FRAME_IN_TEXT.finditer(str(error)):
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


def _one_line(error: BaseException) -> str:
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
