"""The terminal as rich draws on it: text as it is, and one part that is drawn again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import IO, cast

from rich.console import Console, RenderableType
from rich.live import Live

from orchestrator.terminal import SafeStream


def open_console(stream: SafeStream, *, drawing: bool, width: int | None = None) -> Console:
    """Return a console that takes text literally.

    Args:
        stream: where it writes.
        drawing: whether it may use colours and move the cursor.
        width: columns; None for those of the terminal.
    """
    return Console(
        file=cast("IO[str]", stream),
        force_terminal=drawing,
        color_system="auto" if drawing else None,
        width=width,
        markup=False,
        highlight=False,
        emoji=False,
        soft_wrap=False,
    )


def open_live(console: Console, draw: Callable[[], RenderableType]) -> Live:
    """Return a part of the screen that `draw` fills whenever it is refreshed; not yet begun."""
    return Live(
        console=console,
        get_renderable=draw,
        auto_refresh=False,
        redirect_stdout=False,
        redirect_stderr=False,
        transient=True,
    )
