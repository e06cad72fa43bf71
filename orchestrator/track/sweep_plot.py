"""The plot of a sweep: what the children's evaluations said over their steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_SIZE = (8.0, 4.2)  # inches
_DPI = 110
# More lines than a legend can tell apart are drawn without one.
_MAX_NAMED = 12


@dataclass(frozen=True, slots=True)
class Curve:
    """One child's evaluations: (step, value), in order."""

    name: str
    points: Sequence[tuple[int, float]]
    is_best: bool = False


def draw_curves(path: Path, curves: Sequence[Curve], label: str) -> None:
    """Draw the curves of all children that were evaluated.

    Args:
        path: of the PNG file.
        curves: of the children.
        label: of the values.
    """
    # Not pyplot: it keeps figures for ever and looks for a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    drawn = [curve for curve in curves if curve.points]
    for curve in drawn:
        steps, values = zip(*curve.points, strict=True)
        width = 2.6 if curve.is_best else 1.1
        name = f"{curve.name} (best)" if curve.is_best else curve.name
        axes.plot(steps, values, label=_label(name), marker="o", markersize=3, linewidth=width)
    axes.set_xlabel("step")
    axes.set_ylabel(_label(label))
    axes.grid(alpha=0.25)
    if 0 < len(drawn) <= _MAX_NAMED:
        axes.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=_DPI)


def _label(text: str) -> str:
    """Return a text that matplotlib draws as it is: what is between dollars is a formula."""
    return text.replace("$", r"\$")
