"""A stream that never fails the run it reports on, and plain forms of numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import IO

# What replaces the few signs beyond ASCII where the terminal cannot show them.
_ASCII = str.maketrans({"×": "x", "·": "-", "…": "...", "→": "->", "━": "=", "─": "-", "╸": "="})
# Text from a job or a library may hold control characters; a terminal would obey them.
_CONTROLS = {code: None for code in range(32) if chr(code) not in "\n\t"} | {127: None}


class SafeStream:
    """Standard output that may be closed, cut or unable to encode: then output is dropped.

    A reader that has left (`| head`), a terminal that is gone (EIO after SIGHUP) and a full disk
    behind `> file` are no reasons to end a training.
    """

    def __init__(self, stream: IO[str] | None):
        """Wrap a text stream; None, which Python gives for a closed standard output, is dropped."""
        self._stream = stream
        self.dropped = stream is None

    @property
    def encoding(self) -> str:
        """The encoding of the stream."""
        return getattr(self._stream, "encoding", None) or "ascii"

    def isatty(self) -> bool:
        """Return whether a terminal reads the stream."""
        try:
            return self._stream is not None and self._stream.isatty()
        except (OSError, ValueError):
            return False

    def write(self, text: str) -> int:
        """Write what can be written."""
        if self._stream is None or self.dropped:
            return len(text)
        try:
            self._stream.write(self._encodable(text))
        except (OSError, ValueError):
            self.dropped = True
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        if self._stream is None or self.dropped:
            return
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self.dropped = True

    def _encodable(self, text: str) -> str:
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            plain = text.translate(_ASCII)
            return plain.encode(self.encoding, "replace").decode(self.encoding)
        return text


def can_draw(stream: SafeStream, environment: Mapping[str, str]) -> bool:
    """Return whether lines can be redrawn: a terminal that is neither dumb nor without colour."""
    plain = environment.get("TERM", "") in ("", "dumb", "unknown") or environment.get("NO_COLOR")
    return stream.isatty() and not plain


def printable(text: str) -> str:
    """Return the text without control characters other than line ends and tabs."""
    return text.translate(_CONTROLS)


def duration(seconds: float) -> str:
    """Return a time as `30 ms`, `0.3 s`, `12 s`, `3:07` or `1:02:03`."""
    if 0 < seconds < 0.095:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{max(seconds, 0.0):.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes}:{rest:02d}"
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def size(num_bytes: float) -> str:
    """Return a number of bytes as `812 B`, `3.2 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def figure(value: float) -> str:
    """Return a metric with four significant digits."""
    return f"{value:.4g}"


def metrics_text(prefix: str, metrics: Mapping[str, float]) -> str:
    """Return metrics on one line, each with its prefix."""
    return "  ".join(f"{prefix}{name} {figure(value)}" for name, value in metrics.items())


class LogFile:
    """Lines with the time they were written; a disk that is full drops them and no more."""

    def __init__(self, path: Path | None):
        """Append to `path`; None writes nowhere."""
        self._path = path

    def write(self, text: str) -> None:
        """Append each line of a text."""
        if self._path is None:
            return
        now = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
        with contextlib.suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(f"{now} {printable(line)}\n" for line in text.splitlines())
