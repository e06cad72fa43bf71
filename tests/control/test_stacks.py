"""Where a worker is, by dumps as faulthandler writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.control.stacks import Frame, Place, find_place, parse_stacks, pick

TF = "/venv/lib/python3.11/site-packages/tensorflow/python"
LIB = "/usr/lib/python3.11"
OURS = "/src/orchestrator/train"
MINE = "/home/me/jobs/mine.py"
RUNTIME = [f"{TF}/eager/execute.py:53 quick_execute", f"{TF}/eager/context.py:1688 call_function"]
STEP = [f"{OURS}/step.py:130 _call", f"{OURS}/loop.py:116 _block"]
LIFE = [f"{OURS}/worker.py:104 _live", f"{OURS}/worker.py:74 run", f"{OURS}/zygote.py:272 _run"]
IDLE = [f"{LIB}/concurrent/futures/thread.py:81 _worker", f"{LIB}/threading.py:982 run"]
BEACON = [f"{LIB}/threading.py:331 wait", f"{OURS}/report.py:118 beat"]
LINK = [f"{OURS}/link.py:51 _listen", f"{LIB}/threading.py:982 run"]
AWAITED = [f"{LIB}/threading.py:327 wait", f"{LIB}/concurrent/futures/_base.py:451 result"]
FETCHING = [f"{MINE}:20 helper", f"{MINE}:49 fetch", f"{OURS}/data.py:165 fetch_block"]
READING = [f"{TF}/eager/execute.py:53 quick_execute", f"{OURS}/replica_stream.py:80 read"]
GENERATING = [f"{MINE}:61 generate", f"{TF}/ops/script_ops.py:150 __call__"]


def dump(*threads: list[str], current: int = -1, first: int = 1) -> str:
    """Return the text of a dump; frames are `file:line function`, innermost first."""
    current %= len(threads)
    lines = []
    for index, frames in enumerate(threads):
        name = "Current thread" if index == current else "Thread"
        lines.append(f"{name} 0x{first + index:016x} (most recent call first):")
        for frame in frames:
            place, function = frame.split(" ")
            file, line = place.rsplit(":", 1)
            lines.append(f'  File "{file}", line {line} in {function}')
        lines.append("")
    return "\n".join(lines)


IN_THE_BLOCK = dump(IDLE, BEACON, LINK, RUNTIME + STEP + LIFE)
IN_THE_FEEDER = dump(FETCHING + IDLE, BEACON, LINK, AWAITED + STEP[1:] + LIFE)


@pytest.mark.parametrize(
    ("text", "is_silent", "frame", "is_in_runtime"),
    [
        pytest.param(IN_THE_BLOCK, False, f"{TF}/eager/execute.py:53", True, id="in the block"),
        pytest.param(IN_THE_FEEDER, False, f"{MINE}:20", False, id="its feeder is awaited"),
        pytest.param(
            dump(BEACON, FETCHING + STEP[1:] + LIFE), False, f"{MINE}:20", False, id="its own input"
        ),
        pytest.param(
            dump(FETCHING + IDLE, RUNTIME + STEP + LIFE),
            False,
            f"{TF}/eager/execute.py:53",
            True,
            id="in the block while its feeder reads ahead",
        ),
        pytest.param(
            dump(FETCHING + IDLE, RUNTIME + STEP + LIFE),
            True,
            f"{MINE}:20",
            False,
            id="its feeder holds the interpreter",
        ),
        pytest.param(
            dump(GENERATING, READING + IDLE, AWAITED + LIFE),
            False,
            f"{MINE}:61",
            False,
            id="a generator under tf.data is awaited",
        ),
        pytest.param(
            dump(GENERATING, [*RUNTIME, f"{OURS}/data.py:3 take", *LIFE]),
            False,
            f"{MINE}:61",
            False,
            id="the runtime calls a generator",
        ),
        pytest.param(
            dump(READING + IDLE, AWAITED + LIFE),
            False,
            f"{TF}/eager/execute.py:53",
            False,
            id="TensorFlow's own reading is awaited",
        ),
        pytest.param(
            dump([f"{MINE}:88 on_block", f"{OURS}/loop.py:150 _report", *LIFE]),
            False,
            f"{MINE}:88",
            False,
            id="a callback of the job",
        ),
        pytest.param(
            dump([*RUNTIME, f"{MINE}:30 loss", *STEP, *LIFE]),
            False,
            f"{MINE}:30",
            True,
            id="an eager step computes",
        ),
        pytest.param(
            dump([*RUNTIME, f"{MINE}:30 fetch", *LIFE]),
            False,
            f"{MINE}:30",
            False,
            id="the job's input reads through TensorFlow",
        ),
        pytest.param(
            dump([f"{OURS}/devices.py:146 _await_chief", *LIFE]),
            False,
            f"{OURS}/devices.py:146",
            False,
            id="it waits for the chief",
        ),
        pytest.param(
            dump([f"{MINE}:9 <module>", "<frozen:241 call", f"{OURS}/loading.py:26 load", *LIFE]),
            False,
            f"{MINE}:9",
            False,
            id="the job's module is imported",
        ),
        pytest.param(
            dump(RUNTIME + STEP + LIFE + [f"{MINE}:1 <module>"]),
            False,
            f"{TF}/eager/execute.py:53",
            True,
            id="what started the worker is not what it does",
        ),
    ],
)
def test_the_place_of_a_worker(text: str, is_silent: bool, frame: str, is_in_runtime: bool) -> None:
    place = find_place(text, is_silent=is_silent)
    assert place is not None
    assert (f"{place.frame.file}:{place.frame.line}", place.is_in_runtime) == (frame, is_in_runtime)
    assert place.frame in place.stack


@pytest.mark.parametrize("text", ["", "\n", "Fatal Python error: Aborted\n", "Thread 0x"])
def test_a_text_without_a_stack_tells_nothing(text: str) -> None:
    assert find_place(text) is None


def test_the_last_dump_of_a_file_counts() -> None:
    place = find_place(IN_THE_BLOCK + IN_THE_FEEDER)
    assert place is not None and place.frame == Frame(MINE, 20, "helper")


def test_a_dump_that_is_cut_short_tells_what_is_there() -> None:
    threads = parse_stacks(IN_THE_FEEDER[: IN_THE_FEEDER.index("data.py")])
    assert threads == [(Frame(MINE, 20, "helper"), Frame(MINE, 49, "fetch"))]


def test_names_of_threads_in_later_pythons_are_read_over() -> None:
    text = f'Thread 0x01 [feeder] (most recent call first):\n  File "{MINE}", line 3 in f\n'
    assert parse_stacks(text) == [(Frame(MINE, 3, "f"),)]


def test_a_frame_is_told_with_its_line_of_code_where_the_file_is_there(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def fetch():\n    time.sleep(1000)\n")
    assert str(Frame(str(file), 2, "fetch")) == f"{file}:2 in fetch: time.sleep(1000)"
    assert str(Frame(str(file), 9, "fetch")) == f"{file}:9 in fetch"
    assert str(Frame("/nowhere/mine.py", 2, "fetch")) == "/nowhere/mine.py:2 in fetch"


def place(*, is_in_runtime: bool) -> Place:
    frame = Frame(MINE, 1, "f")
    return Place(frame, (frame,), is_in_runtime)


@pytest.mark.parametrize(
    ("places", "worker"),
    [
        ({0: place(is_in_runtime=True), 1: place(is_in_runtime=False)}, 1),
        ({0: place(is_in_runtime=True), 1: None}, 1),
        ({0: None, 1: place(is_in_runtime=False)}, 1),
        ({0: place(is_in_runtime=False), 1: place(is_in_runtime=False)}, 0),
        ({2: place(is_in_runtime=True), 1: place(is_in_runtime=True)}, 1),
    ],
)
def test_the_one_outside_the_runtime_holds_the_others_up(
    places: dict[int, Place | None], worker: int
) -> None:
    assert pick(places) == worker
