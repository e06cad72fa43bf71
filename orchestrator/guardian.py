"""Outlives a driver that is killed, and ends the record of its run: no run stays RUNNING for ever.

A shell waits at the other end of a pipe, in a session of its own and adopted by init, and so out of
reach of what ends the driver's process group and its children. It becomes
`python -m orchestrator.guardian` only when the pipe breaks without a word: the driver was killed,
or was in a hurry and left to the guardian what MLflow had not taken yet.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from orchestrator.lease import lock
from orchestrator.spec.messages import DRIVER_KILLED
from orchestrator.spec.paths import PROJECT_DIR, RunPaths
from orchestrator.spec.secrets import mask_text

# With credentials, which the journal does not keep.
_URI_VARIABLE = "ORCHESTRATOR_GUARDED_URI"
_ARTIFACTS_VARIABLE = "ORCHESTRATOR_GUARDED_ARTIFACTS"
# Who restarts a driver at once, as a retry loop does, goes on with the run: nothing is to be ended.
GRACE_S = 3.0
# A server that is away for a minute, as one that is started again, has the whole record then.
_DEADLINE_S = 120.0
_LOOK_S = 1.0
# In the background, so that init adopts it: Ray's job stop ends a driver's children too. A job in
# the background would read from /dev/null, hence the other descriptor.
_WAIT = 'exec 3<&0; { read -r _ <&3 && exit 0; exec "$@" 3<&-; } &'


class Guard:
    """What a process may say to its guardian.

    Attributes:
        is_owed: whether the guardian is to bring the record to its end though nobody was killed.
    """

    is_owed = False

    def hand_over(self) -> None:
        """Leave to the guardian what the record lacks when this process ends."""
        self.is_owed = True

    def take_back(self) -> None:
        """Leave nothing to it: the record is whole."""
        self.is_owed = False


@contextlib.contextmanager
def guarded(
    paths: RunPaths,
    tracking_uri: str,
    artifact_root: str | None,
    module: str = "orchestrator.guardian",
) -> Iterator[Guard]:
    """Let a guardian watch this process while a block runs; yield what it listens to.

    Args:
        paths: of the run whose lease this process holds.
        tracking_uri: of its MLflow.
        artifact_root: where a local SQLite store keeps artifacts.
        module: what the guardian becomes when this process is killed.
    """
    environment = {**os.environ, "PYTHONPATH": _python_path(), _URI_VARIABLE: tracking_uri}
    if artifact_root is not None:
        environment[_ARTIFACTS_VARIABLE] = artifact_root
    command = [sys.executable, "-m", module, str(paths.root)]
    with _log(paths) as log:
        guardian = subprocess.Popen(
            ["/bin/sh", "-c", _WAIT, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            cwd="/",
            env=environment,
            start_new_session=True,
        )
    guard = Guard()
    try:
        yield guard
    finally:
        with contextlib.suppress(OSError):  # somebody has ended it
            guardian.communicate(b"" if guard.is_owed else b"done\n")


def end_record(root: Path, environment: Mapping[str, str]) -> None:
    """Close the journal of a run that nobody holds, and tell MLflow all that is in it.

    Args:
        root: the run folder.
        environment: holds the address of MLflow.
    """
    paths = RunPaths(root)
    starts = _num_starts(paths)
    time.sleep(GRACE_S)
    # Whoever holds the run by now may yet be refused before it has begun.
    while (has_closed := _close_journal(paths)) is None:
        if _num_starts(paths) != starts:
            return
        time.sleep(_LOOK_S)
    if not has_closed:
        return
    # Importing it takes seconds: the run may have been taken up meanwhile.
    from orchestrator.track.mlflow_projection import sync
    from orchestrator.track.report import write_report

    with held(paths) as is_held:
        if not is_held:
            return
    complete = functools.partial(
        sync,
        root,
        uri=environment.get(_URI_VARIABLE),
        artifact_root=environment.get(_ARTIFACTS_VARIABLE),
        deadline_s=_DEADLINE_S,
        sends_again=False,
        is_patient=True,
    )
    report = complete()
    # The status is what somebody waits for; the page takes seconds to draw.
    with contextlib.suppress(Exception):  # whatever is wrong with it, the record is to be whole
        write_report(paths)
        report = report if report.missing else complete()
    if report.missing:
        print(f"MLflow lacks the last records of {root}: {report.missing}", file=sys.stderr)


def _close_journal(paths: RunPaths) -> bool | None:
    """Write down that the run has ended, if that is not known.

    Returns:
        Whether there is a run on record; None where somebody holds it.
    """
    from orchestrator.track.journal import Journal, read

    with held(paths) as is_held:
        if not is_held:
            return None
        newest = _newest_bound(read(paths.journal))
        if newest is None:
            return False
        if newest == "RunStarted":
            journal = Journal(paths.journal)
            now = time.time()
            journal.append(
                {"kind": "RunEnded", "time": now, "status": "KILLED", "cause": DRIVER_KILLED}
            )
            journal.close()
    return True


def _num_starts(paths: RunPaths) -> int:
    from orchestrator.track.journal import read

    return sum(record.get("kind") == "RunStarted" for record in read(paths.journal))


def _newest_bound(records: Iterator[Mapping[str, Any]]) -> str | None:
    """Return whether a run was started or ended last, as RunStarted, RunEnded or nothing."""
    kinds = [r["kind"] for r in records if r.get("kind") in ("RunStarted", "RunEnded")]
    return kinds[-1] if kinds else None


@contextlib.contextmanager
def held(paths: RunPaths) -> Iterator[bool]:
    """Hold the run's lease, without a word about the holder, if nobody else does."""
    with paths.lease.open("a+") as file:
        try:
            lock(file)
        except OSError:
            yield False
        else:
            yield True


@contextlib.contextmanager
def _log(paths: RunPaths) -> Iterator[IO[bytes]]:
    paths.logs_dir.mkdir(parents=True, exist_ok=True)
    with (paths.logs_dir / "guardian.log").open("ab") as file:
        yield file


def _python_path() -> str:
    given = os.environ.get("PYTHONPATH")
    return f"{PROJECT_DIR}{os.pathsep}{given}" if given else str(PROJECT_DIR)


def main(argv: list[str]) -> int:
    """End the record of the run whose folder is named."""
    root = Path(argv[0])
    try:
        end_record(root, os.environ)
    except Exception as error:
        print(f"the record of {root} could not be ended: {mask_text(repr(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
