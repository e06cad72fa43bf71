"""`runs stop`: asks the driver of a run to save and stop, and tells how that ended."""

from __future__ import annotations

import os
import signal
import time

from orchestrator.asking import ask_to_stop, was_heard, withdraw
from orchestrator.errors import ClusterError, ExitCode
from orchestrator.lease import Holder, holder_of
from orchestrator.spec.paths import RunPaths
from orchestrator.status import final_words, read_status

_LOOK_INTERVAL_S = 0.2
# A driver looks four times a second; a network file system may show the file seconds late.
_HEARING_S = 15.0
_FORCED_HEARING_S = 5.0
# When a driver that was asked to end at once must be gone: it takes two seconds.
_FORCED_END_S = 8.0


def stop(paths: RunPaths, *, force: bool, address: str | None) -> ExitCode:
    """Stop a run and wait for its end; of a run that nobody trains, tell how it ended.

    Args:
        paths: of the run.
        force: end at once, without a save; a driver of this host that does not answer is killed.
        address: of the job server it was submitted to.

    Raises:
        ClusterError: its driver does not answer.
        StorageError: the run folder cannot be written.
    """
    holder = holder_of(paths)
    if holder is None:
        print(f"nobody trains it: {final_words(paths, address)}")
        return ExitCode.DONE
    ask_to_stop(paths, at_once=force)
    wanted = "end at once" if force else "save and stop"
    print(f"asked {holder.words} to {wanted}", flush=True)
    if not force:
        print("  a second stop, or force=true, ends it now", flush=True)
    if not _wait_until_heard(paths, holder, _FORCED_HEARING_S if force else _HEARING_S):
        _end_deaf_driver(paths, holder, force=force)
    elif force:
        _wait_for_end(paths, time.monotonic() + _FORCED_END_S)
        if holder_of(paths) is not None:
            _end_deaf_driver(paths, holder, force=True)
    else:
        _wait_for_end(paths, None)
    print(final_words(paths, address))
    return ExitCode.DONE


def _wait_until_heard(paths: RunPaths, holder: Holder, limit_s: float) -> bool:
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        if was_heard(paths) or holder_of(paths) is None:
            return True
        time.sleep(_LOOK_INTERVAL_S)
    return False


def _wait_for_end(paths: RunPaths, deadline: float | None) -> None:
    """Wait until the driver has given the run back; the save may take as long as it takes."""
    step = read_status(paths).step
    while holder_of(paths) is not None and (deadline is None or time.monotonic() < deadline):
        time.sleep(_LOOK_INTERVAL_S)
    now = read_status(paths)
    if now.step > step:
        print(f"the block was finished: step {now.step:,}")


def _end_deaf_driver(paths: RunPaths, holder: Holder, *, force: bool) -> None:
    """Kill a driver that does not answer, where that is asked for and possible."""
    withdraw(paths)
    if not force:
        raise ClusterError(
            f"{holder.words} does not answer: it may be stopped (Ctrl-Z), or its host hang. "
            "force=true, on its host, kills it; its workers end by themselves"
        )
    if holder.pid is None:
        raise ClusterError(
            f"{holder.words} does not answer, and only its own host can kill it: say it there, or "
            "kill that process; its workers end by themselves"
        )
    try:
        os.kill(holder.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # it has just ended
    except PermissionError as error:
        raise ClusterError(
            f"{holder.words} does not answer, and is another user's: only who trains can kill it; "
            "its workers end by themselves"
        ) from error
    print(f"it did not answer: killed {holder.words}")
    _wait_for_end(paths, time.monotonic() + _FORCED_END_S)
