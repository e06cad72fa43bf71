"""What a dump of `faulthandler` tells: where each thread of a worker is, and who holds it up."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_THREAD = re.compile(r"(?:Current thread|Thread) (0x[0-9a-f]+)(?: \[[^\]]*\])? \(most recent call ")
_FRAME = re.compile(r'  File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<function>.+)')
# Neither a job's nor a user's: Python itself, what is installed, and the project.
_LIBRARIES = (
    "/site-packages/",
    "/dist-packages/",
    "/lib/python3",
    "/lib64/python3",
    "/orchestrator/train/",
)
# Where Python hands over to TensorFlow's runtime, which runs graphs and collectives.
_RUNTIME = re.compile(r"/tensorflow/python/(eager/|framework/ops\.py|ops/gen_)")
# Where the runtime calls back into Python: generators under tf.data, py_function.
_CALLBACK = re.compile(r"/tensorflow/python/ops/script_ops\.py$")
# What runs the compiled functions that hold collectives, unless it is reading input.
_GRAPHS = re.compile(r"/orchestrator/train/(step|evaluate|agreement|audit)\.py$")
_INPUT = re.compile(r"/orchestrator/train/(data|stream_feeder|replica_stream)\.py$")
# Where a thread waits for another one.
_WAITING = re.compile(r"/(threading|concurrent/futures/(_base|thread)|queue)\.py$")
# Threads that never run a job's code.
_OWN_THREADS = re.compile(r"/orchestrator/train/(link|report)\.py$")
# The function of the thread that lives the worker's life.
_LIFE = ("/orchestrator/train/worker.py", "run")


@dataclass(frozen=True, slots=True)
class Frame:
    """A line of a stack."""

    file: str
    line: int
    function: str

    @property
    def is_users(self) -> bool:
        """Whether it lies in a job or another module of the user's own."""
        return self.file[:1] != "<" and not any(part in self.file for part in _LIBRARIES)

    def __str__(self) -> str:
        source = _source_line(self.file, self.line)
        where = f"{self.file}:{self.line} in {self.function}"
        return f"{where}: {source}" if source else where


@dataclass(frozen=True, slots=True)
class Place:
    """Where a worker is.

    Attributes:
        frame: the innermost line of the user's own that it is held at, else the innermost at all.
        stack: of the thread that the frame is of, innermost first.
        is_in_runtime: it computes, or waits for the others, in TensorFlow: nothing of Python
            holds it up.
    """

    frame: Frame
    stack: tuple[Frame, ...]
    is_in_runtime: bool


def parse_stacks(text: str) -> list[tuple[Frame, ...]]:
    """Return the stacks of all threads in the last whole dump of a text, innermost frame first."""
    threads: dict[str, list[Frame]] = {}
    current: list[Frame] = []
    for line in text.splitlines():
        if match := _THREAD.match(line):
            if match[1] in threads:
                threads = {}  # the next dump begins: each has every thread once
            current = threads[match[1]] = []
        elif match := _FRAME.match(line):
            current.append(Frame(match["file"], int(match["line"]), match["function"]))
    return [tuple(frames) for frames in threads.values() if frames]


def find_place(text: str, *, is_silent: bool = False) -> Place | None:
    """Return where the worker of a dump is; None if the dump tells nothing.

    The thread that lives the worker's life counts. Where it waits for a thread that reads ahead,
    that one counts, and where it is in the runtime, the user's code that the runtime calls back.

    Args:
        text: one or more dumps, of which the last counts.
        is_silent: whether the worker sends no beacons. Then any of its threads may hold the
            interpreter, also while the life's thread seems to be in the runtime.
    """
    threads = parse_stacks(text)
    if not threads:
        return None
    # The first thread of a process is the last of a dump.
    life = next((stack for stack in threads if _lives(stack)), threads[-1])
    innermost, is_in_graph = life[0], _is_in_graph(life)
    own = _users(life)
    if own is not None and not is_in_graph:
        return Place(own, life, False)
    is_waiting = bool(_WAITING.search(innermost.file))
    for stack in threads:
        may_count = is_silent or is_waiting or any(_CALLBACK.search(f.file) for f in stack)
        if stack is not life and may_count and (theirs := _users(stack)):
            return Place(theirs, stack, False)
    if is_waiting:
        for stack in threads:
            idle = _WAITING.search(stack[0].file) or any(_OWN_THREADS.search(f.file) for f in stack)
            if not idle:
                return Place(stack[0], stack, False)
    return Place(own or innermost, life, is_in_graph)


def pick(places: dict[int, Place | None]) -> int:
    """Return the worker that holds the others up, as their stacks tell: one not in the runtime.

    Args:
        places: of those who may be the one; at least one.
    """

    def innocence(worker: int) -> tuple[int, int]:
        place = places[worker]
        if place is None:
            return 1, worker  # it could not even tell where it is
        return (2 if place.is_in_runtime else 0), worker

    return min(places, key=innocence)


def _lives(stack: Sequence[Frame]) -> bool:
    return any(f.file.endswith(_LIFE[0]) and f.function == _LIFE[1] for f in stack)


def _users(stack: Sequence[Frame]) -> Frame | None:
    """Return the innermost frame of the user's own; what started the worker is below its life."""
    for frame in stack:
        if frame.is_users:
            return frame
        if frame.file.endswith(_LIFE[0]) and frame.function == _LIFE[1]:
            return None
    return None


def _is_in_graph(stack: Sequence[Frame]) -> bool:
    """Tell whether a thread runs one of the functions that hold collectives."""
    return (
        bool(_RUNTIME.search(stack[0].file))
        and any(_GRAPHS.search(frame.file) for frame in stack)
        and not any(_INPUT.search(frame.file) for frame in stack)
    )


def _source_line(file: str, line: int) -> str:
    """Return a line of code, if the file is on this host too."""
    try:
        lines = Path(file).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return lines[line - 1].strip() if 0 < line <= len(lines) else ""
