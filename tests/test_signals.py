"""What signals and the end of the time do to a command."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import threading
from collections.abc import Iterator

import pytest

from orchestrator.errors import ExitCode, Interrupted, interruptions
from orchestrator.signals import Stops
from orchestrator.spec.config import load_config, to_yaml


class Ends:
    """Notes with what exit code the process was ended."""

    def __init__(self) -> None:
        self.code = 0
        self.came = threading.Event()

    def __call__(self, code: int) -> None:
        self.code = code
        self.came.set()


@pytest.fixture
def end() -> Ends:
    return Ends()


@pytest.fixture
def stops(end: Ends) -> Iterator[Stops]:
    ticks = itertools.count()
    with Stops(end=end, clock=lambda: float(next(ticks))) as caught:
        yield caught


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_before_anything_can_be_saved_ends_it_there(stops: Stops) -> None:
    with pytest.raises(Interrupted):
        send(signal.SIGTERM)
    assert stops.is_asked and not stops.is_hurried
    assert stops.exit_code is ExitCode.TERMINATED


def test_a_signal_that_somebody_heeds_raises_nothing(stops: Stops) -> None:
    told: list[str] = []
    stops.hand_over(lambda reason: not told.append(reason))
    send(signal.SIGHUP)
    assert told == ["SIGHUP"] and stops.exit_code is ExitCode.INTERRUPTED


def test_a_second_signal_raises_and_sets_a_limit(stops: Stops, end: Ends) -> None:
    stops.hand_over(lambda reason: True)
    send(signal.SIGINT)
    with pytest.raises(Interrupted):
        send(signal.SIGTERM)
    assert stops.is_hurried
    assert end.came.wait(10) and end.code == 143


def test_the_end_of_the_time_is_a_stop_with_its_own_code(stops: Stops) -> None:
    told = threading.Event()
    stops.hand_over(lambda reason: not told.set())
    stops.limit(0.01)
    assert told.wait(5)
    assert stops.exit_code is ExitCode.OUT_OF_TIME


def test_a_signal_after_the_time_is_over_is_no_second_one(stops: Stops) -> None:
    told: list[str] = []
    came = threading.Event()
    stops.hand_over(lambda reason: not (told.append(reason), came.set())[1])
    stops.limit(0.0)
    assert came.wait(5)
    send(signal.SIGTERM)
    assert told == ["train.max_time_s is over"] and not stops.is_hurried
    with pytest.raises(Interrupted):
        send(signal.SIGTERM)


def test_a_worker_that_was_asked_to_stop_gives_its_signals_code(stops: Stops) -> None:
    assert stops.exit_code is ExitCode.TERMINATED


@pytest.mark.parametrize(
    ("number", "counts"),
    [(signal.SIGTERM, False), (signal.SIGHUP, False), (signal.SIGINT, True)],
)
def test_a_signal_that_make_passes_on_counts_once(number: signal.Signals, counts: bool) -> None:
    with Stops(clock=lambda: 0.0, end=lambda code: None) as stops:
        stops.hand_over(lambda reason: True)
        send(number)
        with pytest.raises(Interrupted) if counts else contextlib.nullcontext():
            send(number)
        assert stops.is_hurried is counts


def test_handlers_are_put_back() -> None:
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    with Stops():
        assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    assert {n: signal.getsignal(n) for n in before} == before


def test_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stops() as stops:
            send(signal.SIGHUP)
            assert not stops.is_asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_in_the_midst_of_omegaconf_stays_an_interruption() -> None:
    config = load_config(["job=mnist"], None)
    delays = random.Random(3)
    for _ in range(150):  # about one in twenty comes out as a ConfigKeyError
        with Stops() as stops, pytest.raises(Interrupted), interruptions():
            stops.limit(delays.uniform(0.001, 0.03))
            while not stops.is_asked:  # a library may swallow it
                to_yaml(config)
            raise Interrupted


def test_a_signal_that_spoils_a_librarys_tidying_stays_an_interruption(stops: Stops) -> None:
    with pytest.raises(Interrupted), interruptions():
        try:
            send(signal.SIGTERM)
        finally:
            int("half made")


def test_an_error_of_its_own_is_no_interruption() -> None:
    with pytest.raises(ValueError, match="its own"), interruptions():
        raise ValueError("its own")
