"""What is checked before the first worker is started: a list of checks, each a function."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.control.authentication import token_file
from orchestrator.errors import (
    ClusterError,
    ConfigError,
    OrchestratorError,
    StorageError,
)
from orchestrator.spec.memory import bytes_text
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import ClusterName

_NEEDED_BYTES = 300 * 2**20
_SMALL_SHM_BYTES = 128 * 2**20
FEW_FILES = 4096


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found.

    Attributes:
        seen: what is there, with its figures.
        why: what comes of it.
        mend: the key or command that mends it; empty where nothing need be done.
        error: what a start is refused with; None where it is only said.
    """

    seen: str
    why: str
    mend: str = ""
    error: type[OrchestratorError] | None = None

    @property
    def text(self) -> str:
        """All of it as one sentence."""
        return "; ".join(filter(None, (f"{self.seen}: {self.why}", self.mend)))


Find = Callable[[RunPlan], Finding | None]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that is looked at, in a moment, on the host of the driver.

    Attributes:
        name: as `doctor` prints it.
        find: returns what is wrong, or None.
    """

    name: str
    find: Find


def run_checks(plan: RunPlan) -> list[str]:
    """Run all checks.

    Returns:
        What is worth saying but stops nothing.

    Raises:
        OrchestratorError: all refusals together, as the first one's kind.
    """
    findings = [finding for check in CHECKS if (finding := check.find(plan)) is not None]
    refused = [finding for finding in findings if finding.error is not None]
    if refused:
        assert refused[0].error is not None
        raise refused[0].error("\n".join(finding.text for finding in refused))
    return [finding.text for finding in findings]


def _folder_keeps_promises(plan: RunPlan) -> Finding | None:
    """Do once, on a small scale, what a run will do to its folder: see `docs/reliability.md`."""
    root = plan.paths.root
    probe, renamed = root / ".probe-1", root / ".probe-2"
    doing = "be written"
    for folder in (probe, renamed):  # of a start that was killed in here
        shutil.rmtree(folder, ignore_errors=True)
    try:
        probe.mkdir()
        with (probe / "file").open("wb") as file:
            file.write(b"x")
            file.flush()
            doing = "flush a file to the disk (fsync)"
            os.fsync(file.fileno())
            doing = "lock a file (flock)"
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        doing = "rename a folder"
        probe.rename(renamed)
        doing = "flush a folder to the disk (fsync)"
        _flush_folder(root)
    except OSError as error:
        return Finding(
            f"the run folder {root} cannot {doing}: {error.strerror}",
            "checkpoints need a POSIX file system",
            "set runs_dir to a folder on one",
            StorageError,
        )
    finally:
        for folder in (probe, renamed):
            shutil.rmtree(folder, ignore_errors=True)
    return None


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _disk_has_space(plan: RunPlan) -> Finding | None:
    try:
        free = shutil.disk_usage(plan.paths.root).free
    except OSError:
        return None  # a folder that is not there is told by the check before
    if free >= _NEEDED_BYTES:
        return None
    return Finding(
        f"{plan.paths.root} has {bytes_text(free)} free",
        f"a run needs at least {bytes_text(_NEEDED_BYTES)} for its checkpoints and logs",
        "make room, or set runs_dir to another disk",
        StorageError,
    )


def _data_path_exists(plan: RunPlan) -> Finding | None:
    if plan.data_path is None or plan.config.cluster.name is ClusterName.existing:
        return None
    try:
        os.stat(plan.data_path)
        return None
    except (FileNotFoundError, NotADirectoryError):
        why = "there is nothing there"
    except OSError as error:
        why = f"it cannot be looked at: {error.strerror}"
    return Finding(
        f"data.path={plan.data_path}",
        why,
        "name the file or folder that holds the data, or leave data.path out",
        ConfigError,
    )


def _token_is_private(plan: RunPlan) -> Finding | None:
    """Look at the file that Ray takes the cluster's token from."""
    path = token_file(os.environ)
    if plan.config.cluster.name is not ClusterName.existing or path is None:
        return None
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        return Finding(
            f"the token file {path} cannot be read: {error.strerror}",
            "a cluster with a token lets nobody in without",
            "set RAY_AUTH_TOKEN_PATH to the file that has it",
            ClusterError,
        )
    if not mode & 0o077:
        return None
    return Finding(
        f"the token file {path} has mode {mode:04o}",
        "whoever reads the token runs code on every node",
        f"chmod 600 {path}",
        ClusterError,
    )


def _new_files_are_private(plan: RunPlan) -> Finding | None:
    umask = os.umask(0o077)
    os.umask(umask)
    if umask & 0o002:
        return None
    return Finding(
        f"umask is {umask:03o}",
        "everybody on this host may change checkpoints, exports and the record",
        "say umask 022 before",
    )


def _shared_memory_is_large(plan: RunPlan) -> Finding | None:
    shm = Path("/dev/shm")
    if plan.config.cluster.name is not ClusterName.local or not shm.is_dir():
        return None
    return small_shared_memory(shutil.disk_usage(shm).total, "")


def small_shared_memory(size: int, where: str) -> Finding | None:
    """Return what is said of a /dev/shm of `size` bytes; nothing if that is enough."""
    if size >= _SMALL_SHM_BYTES:
        return None
    return Finding(
        f"{where}/dev/shm has {bytes_text(size)}",
        "Ray falls back to slower files in /tmp",
        "give the container more, such as --shm-size=1g",
    )


def _files_may_be_opened(plan: RunPlan) -> Finding | None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= FEW_FILES:
        return None
    # Raising the soft limit up to the hard one needs no rights.
    wanted = hard if hard != resource.RLIM_INFINITY else 65536
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, 65536), hard))
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= FEW_FILES:
        return None
    return few_files(soft, "")


def few_files(limit: int, where: str) -> Finding:
    """Return what is said of a small limit of open files."""
    return Finding(
        f"{where}at most {limit} files may be open (ulimit -n)",
        f"Ray may need {FEW_FILES}",
        f"say ulimit -n {FEW_FILES} before, or raise it in limits.conf",
    )


def _home_is_writable(plan: RunPlan) -> Finding | None:
    home = Path(os.environ.get("HOME", ""))
    if str(home) != "." and os.access(home, os.W_OK):
        return None
    return Finding(
        "HOME is missing or read-only",
        "Ray keeps its token in the temporary folder",
        "set HOME to a folder that can be written",
    )


CHECKS: list[Check] = [
    Check("run folder", _folder_keeps_promises),
    Check("disk", _disk_has_space),
    Check("data path", _data_path_exists),
    Check("token", _token_is_private),
    Check("umask", _new_files_are_private),
    Check("shared memory", _shared_memory_is_large),
    Check("open files", _files_may_be_opened),
    Check("home", _home_is_writable),
]
