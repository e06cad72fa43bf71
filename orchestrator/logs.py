"""`runs logs`: what the driver or a worker of a run has written, and goes on to write."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from orchestrator.errors import ConfigError, ExitCode
from orchestrator.lease import holder_of
from orchestrator.spec.paths import RunPaths

_LOOK_INTERVAL_S = 0.25
_CHUNK = 1 << 16
_ATTEMPT = re.compile(r"attempt-(\d+)")


def print_logs(paths: RunPaths, worker: int | None, *, follow: bool) -> ExitCode:
    """Print the driver's log, or a worker's of the newest attempt.

    Args:
        paths: of the run.
        worker: which one; None for the driver.
        follow: go on, from attempt to attempt, until nobody trains the run.

    Raises:
        ConfigError: there is no such log.
    """
    log = _log(paths, worker)
    if not log.exists() and not (follow and holder_of(paths)):
        there = ", ".join(sorted(p.stem.split("-")[1] for p in log.parent.glob("worker-*.log")))
        raise ConfigError(
            f"runs logs: there is no {log}"
            + (f"; workers with a log there: {there or 'none'}" if worker is not None else "")
        )
    offset = _print_from(log, 0)
    while follow:
        # Asked first: what is written before it ends is still printed.
        is_held = holder_of(paths) is not None
        newest = _log(paths, worker)
        offset = _print_from(log, offset)
        if newest != log:
            print(f"==> {newest.relative_to(paths.logs_dir)} <==", flush=True)
            log, offset = newest, 0
        elif not is_held:
            break
        time.sleep(_LOOK_INTERVAL_S)
    return ExitCode.DONE


def _log(paths: RunPaths, worker: int | None) -> Path:
    if worker is None:
        return paths.driver_log
    numbers = [int(m[1]) for p in paths.logs_dir.glob("attempt-*") if (m := _ATTEMPT.match(p.name))]
    return paths.worker_log(max(numbers, default=1), worker)


def _print_from(log: Path, offset: int) -> int:
    """Print what a log has beyond an offset, bytes; return where it ends."""
    try:
        with log.open("rb") as file:
            file.seek(offset)
            while chunk := file.read(_CHUNK):
                sys.stdout.buffer.write(chunk)
                offset += len(chunk)
    except FileNotFoundError:
        return offset
    sys.stdout.flush()
    return offset
