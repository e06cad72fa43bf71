"""What asks a command to stop: signals and a limit of time."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any

from orchestrator.errors import ExitCode, Interrupted

# After a second signal everything must be over in 2 s, whatever still waits for an answer.
_LAST_WORDS_S = 1.6
_ECHO_S = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Echoes:
    """Tells a signal from the one before it once more.

    Who gets it with a whole process group gets it again from `make` or `timeout`, who pass on what
    they get. Ctrl-C is not passed on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        """Begin before any signal.

        Args:
            clock: seconds from any origin.
        """
        self._clock = clock
        self._came_at: dict[int, float] = {}

    def has(self, number: int) -> bool:
        """Tell of a signal that has just come whether it is an echo."""
        now, before = self._clock(), self._came_at.get(number)
        self._came_at[number] = now
        return number != signal.SIGINT and before is not None and now - before < _ECHO_S


class Stops:
    """Turns signals and the end of the time into a stop; a second signal into the end.

    While nobody is told what a stop is (`hand_over`), or it says that there is nothing to wait for,
    a stop raises `Interrupted` out of whatever the main thread does. Use it as a context manager in
    the main thread.

    Attributes:
        is_hurried: a second signal has come: everything ends at once.
    """

    def __init__(
        self,
        *,
        end: Callable[[int], Any] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Catch nothing yet.

        Args:
            end: ends the process with an exit code when a second signal has found no end in time.
            clock: seconds from any origin.
        """
        self._echoes = Echoes(clock)
        self.is_hurried = False
        self._end = end
        self._signals: list[int] = []
        self._asked: deque[tuple[str, bool]] = deque()
        self._is_out_of_time = False
        self._stop: Callable[[str], bool] = _nothing_to_wait_for
        self._kept: dict[int, Any] = {}

    def __enter__(self) -> Stops:
        for number in (*_SIGNALS, signal.SIGALRM):
            if number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # `nohup` was asked for
            self._kept[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._kept.items():
            # A handler that was not set from Python cannot be put back by it.
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def limit(self, seconds: float) -> None:
        """Stop after so many seconds, as a first signal would."""
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))

    def ask(self, reason: str, *, at_once: bool) -> None:
        """Stop as SIGTERM would; from any thread.

        Args:
            reason: who asks, for the user to read.
            at_once: as a second signal would.
        """
        self._asked.append((reason, at_once))
        main_thread = threading.main_thread().ident
        assert main_thread is not None
        # To that very thread, so that a call it waits in is interrupted.
        signal.pthread_kill(main_thread, signal.SIGTERM)

    def hand_over(self, stop: Callable[[str], bool] | None) -> None:
        """Say what is done about a stop; None for nothing, then it raises.

        Args:
            stop: called in the main thread, between any two of its instructions, with the reason;
                tells whether something saves and ends by itself.
        """
        self._stop = stop if stop is not None else _nothing_to_wait_for

    @property
    def is_asked(self) -> bool:
        """Whether anything has asked to stop."""
        return bool(self._signals) or self._is_out_of_time

    @property
    def exit_code(self) -> ExitCode:
        """The code of a command that was stopped.

        Without a signal here it was a worker that got one: SIGTERM, the only one it heeds.
        """
        if not self._signals:
            return ExitCode.OUT_OF_TIME if self._is_out_of_time else ExitCode.TERMINATED
        is_terminated = self._signals[-1] == signal.SIGTERM
        return ExitCode.TERMINATED if is_terminated else ExitCode.INTERRUPTED

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._echoes.has(number) and not self._asked:
            return
        was_asked, at_once = self.is_asked, False
        if number == signal.SIGALRM:
            if was_asked:
                return
            self._is_out_of_time = True
            reason = "train.max_time_s is over"
        else:
            self._signals.append(number)
            reason = signal.Signals(number).name
            if number == signal.SIGTERM and self._asked:
                reason, at_once = self._asked.popleft()
        if len(self._signals) > 1 or at_once:
            self._hurry()
            raise Interrupted
        # A signal just after the time was over, as batch systems send it, changes nothing.
        if not was_asked and not self._stop(reason):
            raise Interrupted

    def _hurry(self) -> None:
        if self.is_hurried:
            return
        self.is_hurried = True
        timer = threading.Timer(_LAST_WORDS_S, self._end, [int(self.exit_code)])
        timer.daemon = True
        with contextlib.suppress(RuntimeError):  # the interpreter ends already
            timer.start()


def _nothing_to_wait_for(reason: str) -> bool:
    return False
