"""Plots of a run as PNG files, drawn with matplotlib from points that MLflow has too."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.track.account import Account

Series = Mapping[str, Sequence[tuple[int, float]]]

_SIZE = (7.2, 3.4)  # inches
_DPI = 110
# Set, not found: matplotlib's own search for them draws everything a second time.
_MARGINS = {"left": 0.12, "right": 0.98, "bottom": 0.15, "top": 0.96}
_BAR_HEIGHT = 1.7
_BAR_MARGINS = {"left": 0.03, "right": 0.97, "bottom": 0.3, "top": 0.6}
_MAX_POINTS = 2000
_COLOURS = {
    "productive": "#2a9d4a",
    "data_wait": "#e9c46a",
    "evaluation": "#4c78a8",
    "checkpoint_stall": "#b279a2",
    "export": "#72b7b2",
    "building": "#9d9d9d",
    "starting": "#c8c8c8",
    "waiting": "#eeca3b",
    "recovering": "#f58518",
    "lost_work": "#d62728",
}
# Beside these, each metric that is trained or evaluated has a plot of its own, up to so many.
_MOST_METRICS = 12
_FIGURES = {
    "learning_rate": (r"train/learning_rate(/.*)?", "learning rate"),
    "throughput": (r"perf/examples_per_s", "examples/s"),
    "step_time": (r"worker/\d+/step_ms", "ms a step"),
    "gradient_norm": (r"train/gradient_norm", "gradient norm"),
}
# Of each variable: too many for a plot each.
_NORMS = r"train/(gradient|weight)_norm/.*"
_SPIKY = ("ms a step",)
# A legend of more lines leaves no room for the plot.
_MOST_NAMED = 12
_OTHERS_COLOUR = "#c8c8c8"


def draw(found: Account, folder: Path) -> list[Path]:
    """Draw what there is something to see of.

    Args:
        found: the run.
        folder: takes the files; made if it is missing.

    Returns:
        The files, in the order a reader wants them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    taken = {*_FIGURES, "goodput"}
    for name in _metrics(found.series):
        keys = [key for key in (f"train/{name}", f"eval/{name}") if key in found.series]
        stem = re.sub(r"[^\w\-]", "_", name)
        while stem in taken:
            stem += "_"
        taken.add(stem)
        drawn.append(_lines(folder / f"{stem}.png", {key: found.series[key] for key in keys}, name))
    for name, (pattern, label) in _FIGURES.items():
        chosen = {key: s for key, s in found.series.items() if re.fullmatch(pattern, key)}
        if chosen:
            drawn.append(_lines(folder / f"{name}.png", chosen, label))
    if found.goodput.wall_s > 0:
        drawn.append(_bar(folder / "goodput.png", found.goodput.seconds()))
    return drawn


def _metrics(series: Series) -> list[str]:
    """Return what was measured of the model: the loss, what is both trained and evaluated, others.

    What has a figure of its own is left out.
    """
    others = [_NORMS, *(pattern for pattern, _ in _FIGURES.values())]
    shown = [key for key in series if not any(re.fullmatch(other, key) for other in others)]
    trained = {key.removeprefix("train/") for key in shown if key.startswith("train/")}
    evaluated = {key.removeprefix("eval/") for key in shown if key.startswith("eval/")}
    both = trained & evaluated
    ranked = sorted(trained | evaluated, key=lambda name: (name != "loss", name not in both, name))
    return ranked[:_MOST_METRICS]


def _lines(path: Path, series: Series, label: str) -> Path:
    figure = _figure(_SIZE[1], _MARGINS)
    axes = figure.subplots()
    named = labelled(series)
    others = "the others" if len(named) < len(series) else None
    for key in sorted(series, key=named.__contains__):  # the named ones on top
        steps, values = zip(*_thinned(series[key]), strict=True)
        marker = "o" if key.startswith("eval/") or len(series[key]) == 1 else None
        if key in named:
            axes.plot(steps, values, label=key, marker=marker, markersize=4, linewidth=1.2)
        else:
            axes.plot(steps, values, label=others, color=_OTHERS_COLOUR, linewidth=0.8)
            others = None
    if label in _SPIKY:
        # A block that traced, or waited for a peer, would flatten all others.
        heights = sorted(value for points in series.values() for _, value in points)
        axes.set_ylim(0, 1.3 * heights[round(0.98 * (len(heights) - 1))])
    axes.set_xlabel("step")
    axes.set_ylabel(label)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    return _write(figure, path)


def _bar(path: Path, seconds: Mapping[str, float]) -> Path:
    """Draw one bar whose parts are the uses of the run's time."""
    figure = _figure(_BAR_HEIGHT, _BAR_MARGINS)
    axes = figure.subplots()
    total, left = sum(seconds.values()), 0.0
    for use, colour in _COLOURS.items():
        share = seconds.get(use, 0.0)
        if share > 0:
            label = f"{use.replace('_', ' ')} {share / total:.1%}"
            axes.barh([0], [share], left=[left], color=colour, label=label)
            left += share
    axes.set_yticks([])
    axes.set_xlim(0, total)
    axes.set_xlabel("seconds")
    axes.legend(frameon=False, fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _write(figure, path)


def labelled(series: Series) -> list[str]:
    """Return the keys with a name and a colour: all, or of too many those with the highest mean."""
    if len(series) <= _MOST_NAMED:
        return list(series)
    means = {key: sum(value for _, value in points) / len(points) for key, points in series.items()}
    return sorted(means, key=means.__getitem__, reverse=True)[: _MOST_NAMED // 2]


def _thinned(points: Sequence[tuple[int, float]]) -> Sequence[tuple[int, float]]:
    """Return at most so many points that a plot can show, the last one among them."""
    stride = -(-len(points) // _MAX_POINTS)
    return points if stride <= 1 else [*points[:-1:stride], points[-1]]


def _figure(height: float, margins: Mapping[str, float]) -> Any:
    # Not pyplot: it keeps figures for ever and looks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_SIZE[0], height))
    figure.subplots_adjust(**margins)
    return figure


def _write(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=_DPI)
    return path
