"""The children of a sweep as a table: for the terminal, as Markdown and as CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence

from orchestrator.spec.schema import BestConfig, BestMode
from orchestrator.sweep.folder import Sweep
from orchestrator.sweep.state import ChildState
from orchestrator.terminal import duration, figure


def metric_of(best: BestConfig) -> tuple[str, BestMode]:
    """Return what children are compared by: `best.metric`, else the loss."""
    return (best.metric, best.mode) if best.metric is not None else ("loss", BestMode.min)


def best_of(states: Sequence[ChildState], best: BestConfig) -> ChildState | None:
    """Return the child that finished with the best result; None if none has."""
    _, mode = metric_of(best)
    sign = 1 if mode is BestMode.min else -1
    finished = [
        (sign * value, state.child.name, state)
        for state in states
        if state.status == "finished"
        and (value := state.result(best)) is not None
        and not math.isnan(value)
    ]
    return min(finished, key=lambda item: item[:2])[2] if finished else None


def headings(keys: Sequence[str], best: BestConfig) -> list[str]:
    """Return what stands above the columns: keys by their last part where that is enough."""
    short = [key.rpartition(".")[2] for key in keys]
    shown = [leaf if short.count(leaf) == 1 else key for leaf, key in zip(short, keys, strict=True)]
    return ["child", *shown, "status", "steps", f"eval/{metric_of(best)[0]}", "time"]


def rows(states: Sequence[ChildState], best: BestConfig) -> list[list[str]]:
    """Return a row for each child; the best one is marked."""
    winner = best_of(states, best)
    return [_row(state, best, is_best=state is winner) for state in states]


def _row(state: ChildState, best: BestConfig, *, is_best: bool) -> list[str]:
    value = state.result(best)
    shown = "" if value is None else figure(value)
    steps = f"{state.listed.last_step:,}" if state.listed.last_step else ""
    took = duration(state.wall_s) if state.wall_s else ""
    values = [text.strip("'\"") for text in state.child.values.values()]
    mark = " *" if is_best else ""
    return [state.child.name, *values, state.status, steps, f"{shown}{mark}", took]


def text_table(sweep: Sweep, states: Sequence[ChildState], best: BestConfig) -> str:
    """Return the table in aligned columns."""
    lines = [headings(sweep.keys, best), *rows(states, best)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def markdown(sweep: Sweep, states: Sequence[ChildState], best: BestConfig) -> str:
    """Return the table in Markdown, below a line about the best child."""
    winner = best_of(states, best)
    said = "no child has finished"
    if winner is not None:
        value = winner.result(best)
        assert value is not None
        said = f"best: {winner.child.name}, eval/{metric_of(best)[0]} {figure(value)}, with "
        said += ", ".join(f"`{key}={text}`" for key, text in winner.child.values.items())
    head = headings(sweep.keys, best)
    lines = [said, "", _bar(head), _bar(["---"] * len(head))]
    lines += [_bar(row) for row in rows(states, best)]
    notes = [f"* {state.child.name} {state.stopped}" for state in states if state.stopped]
    return "\n".join([*lines, *([""] if notes else []), *notes]) + "\n"


def csv_table(sweep: Sweep, states: Sequence[ChildState], best: BestConfig) -> str:
    """Return all children as comma-separated values, numbers as they are."""
    metrics = sorted(
        {name for s in states for found in s.listed.evaluated.values() for name in found}
    )
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    evals = [f"eval/{name}" for name in metrics]
    writer.writerow(["child", "run", *sweep.keys, "status", "steps", "result", *evals, "note"])
    for state in states:
        found = state.listed.evaluated
        last = found[max(found)] if found else {}
        values = [text.strip("'\"") for text in state.child.values.values()]
        numbers = [last.get(name, "") for name in metrics]
        result = state.result(best)
        writer.writerow(
            [
                *(state.child.name, state.child.run, *values, state.status),
                *(state.listed.last_step, "" if result is None else result, *numbers),
                state.stopped,
            ]
        )
    return out.getvalue()


def _bar(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
