"""A stream that never fails the run it reports on, and plain forms of numbers."""

from __future__ import annotations

import contextlib
import io
import os
import select
import stat
import threading
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import IO

# What replaces the few signs beyond ASCII where the terminal cannot show them.
_ASCII = str.maketrans({"×": "x", "·": "-", "…": "...", "→": "->", "━": "=", "─": "-", "╸": "="})
# A terminal that is stopped (Ctrl-S), or a reader that is slow, is waited for once so long; then
# so much is kept for it, and the rest is dropped.
_PATIENCE_S = 1.0
_MOST_KEPT_BYTES = 1 << 16
_WRITE_BYTES = 4096
# Text from a job or a library may hold control characters; a terminal would obey them.
_CONTROLS = {code: None for code in range(32) if chr(code) not in "\n\t"} | {127: None}


class SafeStream:
    """Standard output that may be closed, cut, stopped or unable to encode: then it is dropped.

    A reader that has left (`| head`), a terminal that is gone (EIO after SIGHUP) or stopped
    (Ctrl-S) and a full disk behind `> file` are no reasons to end a training, or to hold it up.
    """

    def __init__(self, stream: IO[str] | None):
        """Wrap a text stream; None, which Python gives for a closed standard output, is dropped."""
        self._stream = stream
        self._is_broken = stream is None
        fd = _fd_of_a_reader(stream)
        self._writer = _Writer(fd) if fd is not None else None
        if self._writer is not None:
            self._flush_stream()  # what others have printed comes first

    @property
    def dropped(self) -> bool:
        """Whether nothing can be written any more."""
        return self._is_broken or (self._writer is not None and self._writer.is_broken)

    @property
    def is_held_up(self) -> bool:
        """Whether what was written waits for a reader: only what must be told should be added."""
        return self._writer is not None and self._writer.is_held_up

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
            if self._writer is not None:
                self._writer.put(self._encodable(text).encode(self.encoding))
            else:
                self._stream.write(self._encodable(text))
        except (OSError, ValueError):
            self._is_broken = True
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        if self.dropped:
            return
        if self._writer is not None:
            self._writer.wait()
        else:
            self._flush_stream()

    def _flush_stream(self) -> None:
        assert self._stream is not None
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._is_broken = True

    def _encodable(self, text: str) -> str:
        try:
            text.encode(self.encoding)
        except UnicodeEncodeError:
            plain = text.translate(_ASCII)
            return plain.encode(self.encoding, "replace").decode(self.encoding)
        return text


class _Writer:
    """Writes from a thread of its own, the only one that a reader can hold up for long.

    Attributes:
        is_held_up: whether a reader was waited for in vain, until all that was kept is written.
        is_broken: whether nobody can read it any more.
    """

    def __init__(self, fd: int):
        self.is_held_up = False
        self.is_broken = False
        self._fd = fd
        self._kept = bytearray()
        self._changed = threading.Condition()
        threading.Thread(target=self._write, name="terminal", daemon=True).start()

    def put(self, data: bytes) -> None:
        """Have something written; it is dropped as a whole where too much waits already."""
        with self._changed:
            if len(self._kept) >= _MOST_KEPT_BYTES:
                self.wait()
            if len(self._kept) < _MOST_KEPT_BYTES:
                self._kept += data
                self._changed.notify_all()

    def wait(self) -> None:
        """Wait until all is written, unless that was waited for in vain already."""
        with self._changed:
            if not self.is_held_up:
                self.is_held_up = not self._changed.wait_for(self._is_idle, _PATIENCE_S)

    def _is_idle(self) -> bool:
        return self.is_broken or not self._kept

    def _write(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._kept)
                data = bytes(self._kept[:_WRITE_BYTES])
            try:
                # Not the stream's own buffer: its lock, held here, would abort Python's end.
                count = os.write(self._fd, data)
            except BlockingIOError:  # somebody else has set the terminal so
                select.select([], [self._fd], [])
                continue
            except OSError:
                count = 0
            with self._changed:
                del self._kept[:count]
                self.is_broken = count == 0
                if self._is_idle():
                    self.is_held_up = False
                    self._changed.notify_all()
                if self.is_broken:
                    return


def _fd_of_a_reader(stream: IO[str] | None) -> int | None:
    """Return the descriptor of a terminal, pipe or socket; None for files and what is none."""
    if not isinstance(stream, io.TextIOWrapper):
        return None
    try:
        fd = stream.fileno()
        mode = os.fstat(fd).st_mode
    except (OSError, ValueError):
        return None
    return fd if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode) else None


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
