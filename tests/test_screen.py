"""The screen draws on terminals, writes plain lines elsewhere and never fails the run."""

import io
import os
import re
import select
import subprocess
import sys
import termios
import threading
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from orchestrator.screen import Screen, Summary
from orchestrator.spec.messages import (
    Beacon,
    BlockDone,
    Cause,
    Death,
    Evaluated,
    Failed,
    Message,
    Notice,
    Phase,
    Ready,
    Saved,
)
from orchestrator.terminal import SafeStream, can_draw, duration, printable, size

ROOT = Path(__file__).parents[1]
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
HEADER = ["mnist  20260102-0304-a1b2", "mirrored: 1 worker × 2 devices, global batch 32"]


class Stream(io.StringIO):
    """A recorded stream that is a terminal or not."""

    def __init__(self, tty: bool, encoding: str = "utf-8"):
        super().__init__()
        self._tty = tty
        self._encoding = encoding

    @property
    def encoding(self) -> str:
        return self._encoding

    def isatty(self) -> bool:
        return self._tty

    def write(self, text: str) -> int:
        text.encode(self._encoding)  # as a real stream does: raises what it cannot encode
        return super().write(text)

    def text(self) -> str:
        return ESCAPES.sub("", self.getvalue())


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def make_screen(
    stream: Stream, clock: Callable[[], float], width: int = 80, total_steps: int = 1000
) -> Screen:
    return Screen(
        HEADER,
        total_steps=total_steps,
        global_batch_size=32,
        stream=stream,
        clock=clock,
        width=width,
        refresh=False,
    )


def beacon(phase: Phase, worker: int = 0, detail: str = "", attempt: int = 1) -> Beacon:
    return Beacon(worker=worker, attempt=attempt, time=0, phase=phase, step=0, detail=detail)


def block(first_step: int, num_steps: int = 10, worker: int = 0, **values: object) -> BlockDone:
    values = {"wall_s": 0.1, "loss": (0.5,) * num_steps, **values}
    return BlockDone(
        worker=worker,
        attempt=1,
        time=0,
        first_step=first_step,
        num_steps=num_steps,
        data_wait_s=0,
        ledger=0,
        **values,  # type: ignore[arg-type]
    )


def ready(worker: int = 0, restored_from: str | None = None) -> Ready:
    return Ready(
        worker=worker,
        attempt=1,
        time=0,
        host=f"host-{worker}",
        pid=1,
        devices=("CPU:0", "CPU:1"),
        cpu_threads=2,
        replica_batch_sizes=(16, 16),
        num_parameters=101_770,
        start_step=0,
        restored_from=restored_from,
        versions={},
    )


def failed(worker: int, cause: Cause, attempt: int = 1) -> Failed:
    return Failed(
        worker=worker,
        attempt=attempt,
        time=0,
        step=7,
        phase=Phase.stepping,
        cause=cause,
        error=f"error of {worker}",
        user_frame="",
        traceback="",
    )


def evaluated(step: int) -> Evaluated:
    metrics = {"loss": 0.14213, "accuracy": 0.9575}
    return Evaluated(
        worker=0, attempt=1, time=0, step=step, metrics=metrics, num_examples=10_000, wall_s=0.31
    )


def saved(step: int) -> Saved:
    return Saved(
        worker=0,
        attempt=1,
        time=0,
        step=step,
        path="p",
        num_bytes=1_221_000,
        wall_s=0.03,
        stall_s=0,
    )


SUMMARY = Summary(
    title="finished",
    metrics={"eval/accuracy": 0.971},
    steps=1000,
    wall_s=21.3,
    examples_per_s=24_100,
    model="runs/mnist/x/export/mlflow_model",
    commands=[("serve", "make serve run=" + "a-long-name/" * 8)],
)


def run_a_training(screen: Screen, clock: Clock) -> None:
    """Everything that happens in a run with two workers."""
    screen.phase("starting Ray")
    screen.phase("importing TensorFlow")
    clock.now += 4
    screen.phase_done("starting Ray")
    screen.tick()
    clock.now += 2
    screen.phase_done("importing TensorFlow")
    for worker in range(2):
        screen.observe(beacon(Phase.loading_data, worker, "downloading MNIST 4.1/11.5 MB"))
        screen.observe(ready(worker))
    screen.tick()
    clock.now += 1
    for step in range(0, 1000, 50):
        clock.now += 0.5
        screen.observe(block(step, 50, worker=1, wall_s=0.5, loss=()))
        screen.observe(block(step, 50, wall_s=0.5))
        screen.tick()
    screen.observe(evaluated(1000))
    screen.observe(saved(1000))
    screen.finish(SUMMARY)


@pytest.mark.parametrize("width", [80, 40])
@pytest.mark.parametrize("tty", [True, False])
def test_a_whole_run_fits_its_width_on_terminals_and_elsewhere(tty: bool, width: int) -> None:
    stream, clock = Stream(tty), Clock()
    run_a_training(make_screen(stream, clock, width), clock)
    lines = stream.text().replace("\r", "\n").split("\n")
    assert [line for line in lines if len(line) > width] == [
        line for line in lines if "make serve" in line or (width == 40 and "model  " in line)
    ]
    flat = " ".join(stream.text().split())
    for part in (
        "starting Ray: 4.0 s",
        "importing TensorFlow: 6.0 s",
        "step 1,000 eval/loss 0.1421 eval/accuracy 0.9575 (10,000 examples in 0.3 s)",
        "step 1,000 checkpoint saved, 1.2 MB in 30 ms",
        "finished: 1,000 steps in 21 s, 24,100 examples/s",
        "eval/accuracy 0.971",
    ):
        assert part in flat


@pytest.mark.parametrize("width", [80, 40])
def test_commands_are_not_broken_so_that_they_can_be_copied(width: int) -> None:
    stream, clock = Stream(tty=True), Clock()
    make_screen(stream, clock, width).finish(SUMMARY)
    assert SUMMARY.commands[0][1] in stream.text()


def test_a_terminal_shows_running_phases_side_by_side_with_their_times() -> None:
    stream, clock = Stream(tty=True), Clock()
    screen = make_screen(stream, clock)
    screen.phase("starting Ray")
    clock.now += 2
    screen.phase("importing TensorFlow", "once")
    clock.now += 1
    screen.tick()
    assert "starting Ray 3.0 s · importing TensorFlow (once) 1.0 s" in stream.text()
    screen.close()


def test_a_terminal_shows_progress_and_a_row_for_each_worker() -> None:
    stream, clock = Stream(tty=True), Clock()
    screen = make_screen(stream, clock)
    for worker in range(2):
        screen.observe(ready(worker))
    screen.observe(block(0, 10, worker=1, wall_s=0.2, loss=()))
    screen.observe(block(240, 10))
    screen.tick()
    text = stream.text()
    # 10 steps in 0.1 s: 100 steps/s, 3,200 examples/s; 750 steps to go: 7.5 s
    assert "step 250/1,000  25 %  loss 0.5  3,200 examples/s  7.5 s left" in text
    assert "worker 0  host-0  2 × CPU  stepping  10.0 ms/step" in text
    assert "worker 1  host-1  2 × CPU  stepping  20.0 ms/step" in text
    screen.close()


def test_of_many_workers_the_slowest_and_a_count_are_shown() -> None:
    stream, clock = Stream(tty=True), Clock()
    screen = make_screen(stream, clock)
    for worker in range(20):
        screen.observe(block(0, 10, worker=worker, wall_s=0.1 + 0.01 * (worker % 10)))
    screen.tick()
    shown = re.findall(r"worker (\d+)", stream.text())
    # Worker w takes 100 + 10 (w mod 10) ms: 9 and 19, 8 and 18, then 7 before 17.
    assert shown == ["7", "8", "9", "18", "19"]
    assert "and 15 more; these are the slowest" in stream.text()
    screen.close()


def test_many_threads_may_draw_at_once() -> None:
    stream, clock = Stream(tty=True), Clock()
    screen = make_screen(stream, clock)
    screen.observe(block(0))

    def repeat(action: Callable[[], None]) -> threading.Thread:
        def run() -> None:
            for _ in range(200):
                action()

        return threading.Thread(target=run, daemon=True)

    threads = [repeat(screen.tick), repeat(screen.tick), repeat(lambda: screen.notice("n"))]
    threads.append(repeat(lambda: screen.phase_done("never begun")))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    screen.close()


def test_the_screen_redraws_by_itself_until_it_is_closed() -> None:
    drawn = threading.Event()

    class Watched(Stream):
        def write(self, text: str) -> int:
            if "starting Ray" in text:
                drawn.set()
            return super().write(text)

    stream = Watched(tty=True)
    with Screen(HEADER, total_steps=1, global_batch_size=1, stream=stream, width=80) as screen:
        screen.phase("starting Ray")
        assert drawn.wait(30)
    length = len(stream.getvalue())
    screen.tick()
    assert len(stream.getvalue()) == length


def test_the_chiefs_phases_are_timed_like_the_drivers() -> None:
    stream, clock = Stream(tty=False), Clock()
    screen = make_screen(stream, clock)
    screen.observe(beacon(Phase.building))
    screen.observe(beacon(Phase.building, worker=1))
    clock.now += 1
    screen.observe(beacon(Phase.tracing))
    clock.now += 2
    screen.observe(block(0))
    assert "building the model: 1.0 s\ntracing: 2.0 s\n" in stream.text()


def test_the_cursor_comes_back_when_the_driver_fails() -> None:
    stream, clock = Stream(tty=True), Clock()
    with pytest.raises(KeyError), make_screen(stream, clock):
        raise KeyError("driver")
    assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("NO_COLOR", "1"), ("TERM", None)])
def test_a_dumb_or_colourless_terminal_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    stream, clock = Stream(tty=True), Clock()
    run_a_training(make_screen(stream, clock), clock)
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_plain_lines_have_no_escapes_even_when_colour_is_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream, clock = Stream(tty=False), Clock()
    run_a_training(make_screen(stream, clock), clock)
    assert "\x1b" not in stream.getvalue()


def test_plain_progress_is_a_line_for_each_tenth_of_a_quick_run() -> None:
    stream, clock = Stream(tty=False), Clock()
    screen = make_screen(stream, clock)
    for step in range(0, 1000, 10):
        clock.now += 0.01
        screen.observe(block(step))
    shares = re.findall(r"step [\d,]+/1,000  (\d+) %", stream.text())
    assert shares == [str(tenth) for tenth in range(10, 101, 10)]


def test_plain_progress_of_a_long_run_is_seldom_and_becomes_rarer() -> None:
    stream, clock = Stream(tty=False), Clock()
    screen = make_screen(stream, clock, total_steps=10**9)
    times = []
    for second in range(3600):
        clock.now += 1
        before = stream.tell()
        screen.observe(block(second))
        if stream.tell() > before:
            times.append(second)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert min(gaps) == 5
    assert gaps[-1] > 100
    assert len(times) < 120


def test_without_a_terminal_a_long_wait_is_told_every_ten_seconds() -> None:
    stream, clock = Stream(tty=False), Clock()
    screen = make_screen(stream, clock)
    screen.phase("starting Ray")
    for _ in range(25):
        clock.now += 1
        screen.tick()
    assert re.findall(r"starting Ray (\d+) s", stream.text()) == ["10", "20"]


def test_the_first_failure_is_told_and_its_consequences_are_not() -> None:
    stream, clock = Stream(tty=False), Clock()
    screen = make_screen(stream, clock)
    death = Death(
        worker=2,
        attempt=1,
        time=0,
        error="killed by signal 9",
        exit_status=-9,
        log_path="",
        log_tail="",
    )
    messages: list[Message] = [
        failed(0, Cause.collateral),
        failed(3, Cause.collateral),
        death,
        failed(1, Cause.worker),
        failed(1, Cause.collateral),
    ]
    for message in messages:
        screen.observe(message)
    told = [line for line in stream.text().splitlines() if line.startswith("worker")]
    assert told == [
        "worker 0 failed at step 7 while stepping: error of 0",
        "worker 2 is lost: killed by signal 9",
    ]


def test_after_a_workers_own_failure_its_peers_add_nothing() -> None:
    stream, clock = Stream(tty=False), Clock()
    screen = make_screen(stream, clock)
    screen.observe(failed(1, Cause.job))
    screen.observe(failed(0, Cause.collateral))
    assert re.findall(r"error of (\d)", stream.text()) == ["1"]


def test_a_new_attempt_tells_its_own_failure_and_old_messages_are_ignored() -> None:
    stream, clock = Stream(tty=False), Clock()
    screen = make_screen(stream, clock)
    screen.observe(failed(0, Cause.job))
    screen.observe(failed(1, Cause.job, attempt=2))
    screen.observe(failed(2, Cause.job))
    screen.observe(beacon(Phase.building, worker=5))
    assert re.findall(r"error of (\d)", stream.text()) == ["0", "1"]
    assert 5 not in screen.state.workers


def test_notices_and_failures_are_shown_without_their_control_characters() -> None:
    stream, clock = Stream(tty=False), Clock()
    screen = make_screen(stream, clock)
    screen.observe(Notice(worker=0, attempt=1, time=0, text="a [bold]b[/bold] \x1b[2Jc :smile:"))
    screen.failure("worker 1 failed\n  job.py:12 in loss: \x07boom")
    assert "note: a [bold]b[/bold] [2Jc :smile:\n" in stream.getvalue()
    assert "worker 1 failed\n  job.py:12 in loss: boom\n" in stream.getvalue()


@pytest.mark.parametrize("tty", [True, False])
def test_an_ascii_terminal_gets_ascii(tty: bool) -> None:
    stream, clock = Stream(tty, encoding="ascii"), Clock()
    screen = make_screen(stream, clock)
    screen.notice("café → ünder")
    run_a_training(screen, clock)
    assert "1 worker x 2 devices" in stream.text()
    assert "caf? -> ?nder" in stream.text()


class BrokenStream(Stream):
    """Fails after some writes, as a pipe does whose reader has left."""

    def __init__(self, tty: bool, error: Exception):
        super().__init__(tty)
        self.left = 3
        self.error = error

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("tty", [True, False])
@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(32, "Broken pipe"), OSError(5, "Input/output error"), ValueError("closed")],
)
def test_output_that_breaks_is_dropped(tty: bool, error: Exception) -> None:
    stream, clock = BrokenStream(tty, error), Clock()
    run_a_training(make_screen(stream, clock), clock)
    assert stream.left < 0


SCRIPT = """
import sys
from orchestrator.screen import Screen
with Screen(["title"], total_steps=1, global_batch_size=1) as screen:
    for number in range(20000):
        screen.notice(f"line {number}")
sys.exit(7)
"""


def test_a_reader_that_leaves_does_not_change_the_exit_code() -> None:
    reader, writer = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=writer, stderr=subprocess.PIPE, cwd=ROOT
    )
    os.close(writer)
    os.read(reader, 100)
    os.close(reader)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (7, b"")


def read_until(reader: int, wanted: str) -> str:
    """Return what a pipe or terminal gives up to some text; fails when it never comes."""
    read, found = b"", select.poll()
    found.register(reader, select.POLLIN)
    while wanted.encode() not in read:
        assert found.poll(30_000), f"{wanted!r} did not come: {read[-500:]!r}"
        read += os.read(reader, 1 << 16)
    return ESCAPES.sub("", read.decode())


def is_done(action: Callable[[], object]) -> bool:
    """Tell whether something ends, however long it may take."""
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    thread.join(30)
    return not thread.is_alive()


@pytest.mark.parametrize("openpty", [False, True])
def test_a_reader_that_stopped_holds_nothing_up_and_is_written_to_when_it_reads_again(
    openpty: bool,
) -> None:
    reader, writer = os.openpty() if openpty else os.pipe()
    lines = 4000  # of some 60 bytes; a pipe and what is kept for it hold 64 KiB each
    with open(writer, "w") as stream:
        try:
            screen = Screen(HEADER, total_steps=1, global_batch_size=1, stream=stream, width=80)
            told = read_until(reader, HEADER[1][-5:])
            if openpty:
                termios.tcflow(writer, termios.TCOOFF)  # Ctrl-S

            def tell() -> None:
                for number in range(lines):
                    screen.notice(f"{number} " + 50 * "x")

            assert is_done(tell)
            assert is_done(screen.close)
            if openpty:
                termios.tcflow(writer, termios.TCOON)
            told += read_until(reader, "note: 200 ")
            assert all(f"note: {number} " in told for number in range(200))
            while "last words" not in told:
                screen.notice("last words")
                told += read_until(reader, "\n")
        finally:
            os.close(reader)  # or a writer waited for ever


def test_a_closed_standard_output_does_not_change_the_exit_code() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$0" -c "$1" >&-', sys.executable, SCRIPT],
        stderr=subprocess.PIPE,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (7, b"")


def test_only_a_terminal_with_colours_is_drawn_on() -> None:
    terminal = SafeStream(Stream(tty=True))
    assert can_draw(terminal, {"TERM": "xterm"})
    assert can_draw(terminal, {"TERM": "xterm", "NO_COLOR": ""})
    assert not can_draw(terminal, {"TERM": "xterm", "NO_COLOR": "1"})
    assert not can_draw(terminal, {"TERM": "dumb"})
    assert not can_draw(SafeStream(Stream(tty=False)), {"TERM": "xterm"})
    assert not can_draw(SafeStream(None), {"TERM": "xterm"})


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (0.03, "30 ms"),
        (0.31, "0.3 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.6, "1:00"),
        (187, "3:07"),
        (3723, "1:02:03"),
    ],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sizes_are_short() -> None:
    assert [size(812), size(3_200_000), size(5e15)] == ["812 B", "3.2 MB", "5000.0 TB"]


def test_printable_keeps_lines_and_tabs() -> None:
    assert printable("a\tb\nc\x1b\x00\x7f") == "a\tb\nc"
