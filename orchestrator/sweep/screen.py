"""What a sweep draws: one table on a terminal, a line for each change anywhere else."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO

from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from orchestrator.console import open_console, open_live
from orchestrator.spec.schema import BestConfig
from orchestrator.sweep.folder import Sweep, values_text
from orchestrator.sweep.state import ChildState, last_words
from orchestrator.sweep.table import metric_of, text_table
from orchestrator.terminal import SafeStream, can_draw, duration, figure, printable

_REFRESH_S = 0.5
# Without a terminal: a line about those that run after so long without any.
_SILENCE_S = 30.0
_STYLES = {"finished": "green", "running": "bold", "stopped": "yellow", "failed": "red"}


class SweepScreen:
    """Shows the children of a sweep. Use it as a context manager."""

    def __init__(
        self,
        sweep: Sweep,
        states: Sequence[ChildState],
        best: BestConfig,
        *,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """Show nothing yet.

        Args:
            sweep: whose children they are.
            states: of the children; whoever calls `tick` has changed them before.
            best: what they are compared by.
            stream: where to write; None for standard output.
            clock: seconds from any origin.
        """
        self._sweep, self._states, self._best = sweep, states, best
        self._stream = SafeStream(sys.stdout if stream is None else stream)
        self._clock = clock
        self._lock = threading.Lock()
        drawing = can_draw(self._stream, os.environ)
        self._console = open_console(self._stream, drawing=drawing)
        self._live: Live | None = None
        if drawing:
            self._live = open_live(self._console, self._draw)
        self._drawn_s = self._told_s = clock()

    def __enter__(self) -> SweepScreen:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, text: str, style: str = "") -> None:
        """Print a line that stays."""
        with self._lock:
            self._told_s = self._clock()
            self._console.print(Text(printable(text), style=style), soft_wrap=True)

    def started(self, state: ChildState) -> None:
        """Tell that a child's process was started."""
        step = state.listed.last_step
        how = f"goes on, it was at step {step:,}" if state.listed.began else "started"
        self.say(f"{state.child.name} {how}: {values_text(state.child.values)}")

    def ended(self, state: ChildState) -> None:
        """Tell how a child's process ended."""
        told = [f"{state.listed.last_step:,} steps in {duration(state.wall_s)}"]
        value = state.result(self._best)
        if value is not None:
            told.append(f"eval/{metric_of(self._best)[0]} {figure(value)}")
        if state.status == "stopped":
            told.append(state.stopped)
        if state.status == "failed":
            told.append(last_words(self._sweep, state))
            told.append(f"log: {self._sweep.paths.log(state.child.name)}")
        text = f"{state.child.name} {state.status}: {', '.join(told)}"
        self.say(text, _STYLES.get(state.status, ""))

    def tick(self) -> None:
        """Redraw the table, or say once in a while how far those are that run."""
        now = self._clock()
        if self._live is not None:
            if now - self._drawn_s >= _REFRESH_S and not self._stream.is_held_up:
                self._drawn_s = now
                with self._lock:
                    self._live.refresh()
        elif now - self._told_s >= _SILENCE_S:
            self.say(self._progress())

    def table(self) -> None:
        """Print the table, to stay."""
        self.say(f"\n{text_table(self._sweep, self._states, self._best)}")

    def _progress(self) -> str:
        running = [
            f"{state.child.name} at step {state.listed.last_step:,} of {state.child.total_steps:,}"
            for state in self._states
            if state.status == "running"
        ]
        counts = [state.status for state in self._states]
        done = counts.count("finished")
        return f"{done} of {len(counts)} finished; running: {', '.join(running) or 'none'}"

    def _draw(self) -> RenderableType:
        head, *lines = text_table(self._sweep, self._states, self._best).splitlines()
        room = max(3, self._console.height - 4)
        shown = list(zip(lines, self._states, strict=True))
        if len(shown) > room:
            moving = [pair for pair in shown if pair[1].status == "running"]
            others = [pair for pair in shown if pair[1].status != "running"]
            shown = [*moving, *others[: max(0, room - len(moving))]]
        drawn = [Text(head, style="dim")]
        drawn += [Text(line, style=_STYLES.get(s.status, "dim")) for line, s in shown]
        if len(shown) < len(lines):
            drawn.append(Text(f"and {len(lines) - len(shown)} more", style="dim"))
        for text in drawn:
            text.truncate(self._console.width)
        return Text("\n").join(drawn)
