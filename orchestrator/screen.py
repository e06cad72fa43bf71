"""What the driver draws: the only writer to the terminal."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from rich.console import RenderableType
from rich.live import Live
from rich.text import Text

from orchestrator.console import open_console, open_live
from orchestrator.screen_state import Line, ScreenState, Tone, WorkerRow, progress_text
from orchestrator.spec.messages import Message, Phase
from orchestrator.terminal import (
    LogFile,
    SafeStream,
    can_draw,
    duration,
    figure,
    printable,
)

_STYLES = {Tone.plain: "", Tone.good: "green", Tone.note: "yellow", Tone.bad: "red"}
# Drawing costs about 1 ms of the processor that training needs.
_REFRESH_S = 0.25
_MAX_ROWS = 8
_SLOWEST_ROWS = 5
# Columns: of the progress bar, of a host's name; below `_NARROW` hosts are left out.
_SHORTEST_BAR = 8
_LONGEST_BAR = 30
_LONGEST_HOST = 24
_NARROW = 60
# Without a terminal: one line for each tenth of the run, and one after so long without any.
_PLAIN_SILENCE_S = 5.0
_PLAIN_SILENCE_SHARE = 0.05
_WAITING_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How a run ended, for its last lines.

    Attributes:
        title: what happened, such as `finished` or `stopped, checkpoint at step 1,200`.
        metrics: the last evaluation, by full name.
        steps: steps done by this command.
        wall_s: from the command to now.
        examples_per_s: while stepping; None if no step was done.
        model: where the model is; None if there is none.
        commands: what can be done next: a word and the command to copy.
    """

    title: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    wall_s: float = 0.0
    examples_per_s: float | None = None
    model: str | None = None
    commands: Sequence[tuple[str, str]] = ()


class Screen:
    """Draws a run: a live area on a terminal, plain lines anywhere else.

    Every method may be called from any thread and none raises because of the terminal. Use it as
    a context manager, so that the terminal gets its cursor back.
    """

    def __init__(
        self,
        header: Sequence[str],
        *,
        total_steps: int,
        global_batch_size: int,
        stream: IO[str] | None = None,
        log: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        width: int | None = None,
        refresh: bool = True,
    ):
        """Print the header and begin.

        Args:
            header: what the plan decided, a few lines; the first is the title.
            total_steps: the last step of the run.
            global_batch_size: examples a step.
            stream: where to write; None for standard output.
            log: a file that gets every line too, with the time.
            clock: seconds from any origin.
            width: columns; None asks the terminal.
            refresh: call `tick` from a thread; tests call it themselves.
        """
        self._stream = SafeStream(sys.stdout if stream is None else stream)
        self._log = LogFile(log)
        drawing = can_draw(self._stream, os.environ)
        self._console = open_console(self._stream, drawing=drawing, width=width)
        self.state = ScreenState(total_steps, global_batch_size, clock)
        self._lock = threading.RLock()
        self._last_print_s = 0.0
        self._last_plain_step = 0
        self._print_header(header)
        self._live: Live | None = None
        if drawing:
            self._live = open_live(self._console, self._draw)
            self._live.start()
        self._closed = threading.Event()
        if refresh:
            # Not rich's own thread: it takes rich's lock before ours, printing takes them the
            # other way round, and some day the two would wait for each other.
            threading.Thread(target=self._refresh, name="screen", daemon=True).start()

    def __enter__(self) -> Screen:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the live area away and give the cursor back; again does nothing."""
        self._closed.set()
        with self._lock:
            live, self._live = self._live, None
            if live is not None:
                live.stop()

    def keep(self, text: str) -> None:
        """Write something into the log that is shown elsewhere."""
        self._log.write(text)

    def phase(self, name: str, detail: str = "") -> None:
        """Show that the driver is doing something; several phases may run at once."""
        with self._lock:
            self.state.begin(name, detail)

    def phase_done(self, name: str) -> None:
        """Show that a phase is over, and how long it took."""
        with self._lock:
            self._print(self.state.end(name))

    @contextmanager
    def timed(self, name: str, detail: str = "") -> Iterator[None]:
        """Show a phase for as long as the block runs."""
        self.phase(name, detail)
        try:
            yield
        finally:
            self.phase_done(name)

    def observe(self, message: Message) -> None:
        """Take in a message of a worker."""
        with self._lock:
            self._print(self.state.observe(message))
            if self._live is None:
                self._plain_progress()

    def notice(self, text: str) -> None:
        """Show something that the user should read."""
        with self._lock:
            self._print([Line(f"note: {text}", Tone.note)])

    def tick(self) -> None:
        """Redraw; without a terminal, say what is being waited for."""
        with self._lock:
            if self._live is not None:
                if not self._stream.is_held_up:
                    self._live.refresh()
            elif self.state.phases and self._silence_s() >= _WAITING_S:
                self._print([Line(self._phases_text())])

    def finish(self, summary: Summary) -> None:
        """Take the live area away and show how the run ended and what can be done next."""
        self.close()
        with self._lock:
            numbers = [f"{summary.steps:,} steps in {duration(summary.wall_s)}"]
            if summary.examples_per_s is not None:
                numbers.append(f"{summary.examples_per_s:,.0f} examples/s")
            self._print([Line(""), Line(f"{summary.title}: {', '.join(numbers)}", Tone.good)])
            rows = [(name, figure(value)) for name, value in summary.metrics.items()]
            if summary.model:
                rows.append(("model", summary.model))
            self._print_pairs(rows)
            if summary.commands:
                self._print([Line("")])
                self._print_pairs(summary.commands)

    def failure(self, text: str) -> None:
        """Take the live area away and show why the run failed."""
        self.close()
        first, _, rest = text.partition("\n")
        with self._lock:
            self._print([Line(""), Line(first, Tone.bad)])
            if rest:
                self._print([Line(rest)])

    def _print_header(self, header: Sequence[str]) -> None:
        for index, text in enumerate(header):
            self._put(text, "" if index else "bold")

    def _put(self, text: str, style: str) -> None:
        # A path or an address that is broken over lines cannot be copied.
        self._log.write(text)
        whole = any(len(word) > 20 and "/" in word for word in text.split())
        self._console.print(Text(printable(text), style=style), soft_wrap=whole)

    def _print(self, lines: Sequence[Line]) -> None:
        if lines:
            self._last_print_s = self.state.elapsed_s
        for line in lines:
            self._put(line.text, _STYLES[line.tone])

    def _print_pairs(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Print a word and a value a line; never broken, so that commands can be copied."""
        indent = max((len(name) for name, _ in pairs), default=0)
        for name, value in pairs:
            text = Text.assemble((f"  {name:<{indent}}  ", "dim"), printable(value))
            self._console.print(text, soft_wrap=True)

    def _silence_s(self) -> float:
        return self.state.elapsed_s - self._last_print_s

    def _plain_progress(self) -> None:
        """Print a progress line if the last is long enough ago; rarer as the run grows older."""
        state = self.state
        if state.loss is None or state.step == self._last_plain_step:
            return
        total = max(state.total_steps, 1)
        same_tenth = 10 * state.step // total == 10 * self._last_plain_step // total
        silence_s = max(_PLAIN_SILENCE_S, _PLAIN_SILENCE_SHARE * state.elapsed_s)
        if same_tenth and self._silence_s() < silence_s:
            return
        self._last_plain_step = state.step
        self._print([Line(progress_text(state))])

    def _refresh(self) -> None:
        while not self._closed.wait(_REFRESH_S):
            self.tick()

    def _draw(self) -> RenderableType:
        """Return the live area; called by rich under our lock, from `tick`."""
        if self._stream.dropped:
            return Text()
        parts: list[tuple[str, str]] = []
        if self.state.phases:
            parts.append((self._phases_text(), "cyan"))
        if self.state.loss is not None:
            parts.append((self._progress_text(), "bold"))
        parts.extend((text, "dim") for text in self._worker_texts())
        return Text("\n").join(Text(printable(text), style) for text, style in parts)

    def _phases_text(self) -> str:
        texts = []
        for phase in self.state.phases.values():
            detail = f" ({phase.detail})" if phase.detail else ""
            texts.append(f"{phase.name}{detail} {duration(self.state.age_s(phase.started))}")
        return " · ".join(texts)

    def _progress_text(self) -> str:
        text = progress_text(self.state)
        room = min(self._console.width - len(text) - 2, _LONGEST_BAR)
        if room < _SHORTEST_BAR:
            return text
        done = room * self.state.step // max(self.state.total_steps, 1)
        return f"{text}  {'━' * done}{'·' * (room - done)}"

    def _worker_texts(self) -> list[str]:
        """Return a line for each worker; of many, for the slowest."""
        rows = sorted(self.state.workers.values(), key=lambda row: row.worker)
        shown = rows
        if len(rows) > _MAX_ROWS:
            slowest = sorted(rows, key=lambda row: -(row.step_ms or float("inf")))
            shown = sorted(slowest[:_SLOWEST_ROWS], key=lambda row: row.worker)
        width = self._console.width
        table = [self._cells(row, narrow=width < _NARROW) for row in shown]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        texts = []
        for cells in table:
            padded = (f"{cell:<{size}}" for cell, size in zip(cells, widths, strict=True))
            texts.append("  ".join(padded).rstrip()[:width])
        if len(shown) < len(rows):
            texts.append(f"and {len(rows) - len(shown)} more; these are the slowest"[:width])
        return texts

    def _cells(self, row: WorkerRow, *, narrow: bool) -> list[str]:
        doing = row.phase.value
        if row.phase is not Phase.stepping:
            doing += f" {duration(self.state.age_s(row.since))}"
        step = "" if row.step_ms is None else f"{row.step_ms:.1f} ms/step"
        place = [] if narrow else [row.host[:_LONGEST_HOST], row.devices]
        return [f"worker {row.worker}", *place, doing, step]
