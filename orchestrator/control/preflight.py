"""What is checked before the first worker is started: a list of checks, each a function."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ConfigError, OrchestratorError, PlanError, StorageError
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import ClusterName

_NEEDED_BYTES = 300 * 2**20
_SMALL_SHM_BYTES = 128 * 2**20
_FEW_FILES = 4096


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found: refused with `error`, or only said when `error` is None."""

    text: str
    error: type[OrchestratorError] | None = None


Check = Callable[[RunPlan], Finding | None]


def run_checks(plan: RunPlan) -> list[str]:
    """Run all checks.

    Returns:
        What is worth saying but stops nothing.

    Raises:
        OrchestratorError: all refusals together, as the first one's kind.
    """
    findings = [finding for check in CHECKS if (finding := check(plan)) is not None]
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
            f"the run folder {root} cannot {doing}: {error.strerror}; checkpoints need a POSIX "
            "file system: set runs_dir to a folder on one",
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
        f"{plan.paths.root} has {free / 2**20:,.0f} MB free, a run needs at least "
        f"{_NEEDED_BYTES / 2**20:,.0f} MB; make room, or set runs_dir to another disk",
        StorageError,
    )


def _data_path_exists(plan: RunPlan) -> Finding | None:
    if plan.data_path is None or plan.config.cluster.name is ClusterName.existing:
        return None
    if Path(plan.data_path).exists():
        return None
    return Finding(f"data.path={plan.data_path}: there is nothing there", ConfigError)


def _network_is_trusted(plan: RunPlan) -> Finding | None:
    cluster = plan.config.cluster
    beyond_loopback = cluster.name is ClusterName.existing and plan.num_workers > 1
    if not beyond_loopback or cluster.trusted_network:
        return None
    return Finding(
        f"{plan.num_workers} workers on an existing cluster talk through TensorFlow's own ports "
        f"({cluster.port_range}), which have no authentication and let anyone who reaches them "
        "run code; if the network is closed to others, say so with cluster.trusted_network=true",
        PlanError,
    )


def _shared_memory_is_large(plan: RunPlan) -> Finding | None:
    shm = Path("/dev/shm")
    if plan.config.cluster.name is not ClusterName.local or not shm.is_dir():
        return None
    size = shutil.disk_usage(shm).total
    if size >= _SMALL_SHM_BYTES:
        return None
    return Finding(f"/dev/shm has {size / 2**20:.0f} MB: Ray falls back to slower files in /tmp")


def _files_may_be_opened(plan: RunPlan) -> Finding | None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= _FEW_FILES:
        return None
    # Raising the soft limit up to the hard one needs no rights.
    wanted = hard if hard != resource.RLIM_INFINITY else 65536
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, 65536), hard))
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= _FEW_FILES:
        return None
    return Finding(f"at most {soft} files may be open (ulimit -n); Ray may need {_FEW_FILES}")


def _home_is_writable(plan: RunPlan) -> Finding | None:
    home = Path(os.environ.get("HOME", ""))
    if str(home) != "." and os.access(home, os.W_OK):
        return None
    return Finding("HOME is missing or read-only: Ray keeps its token in the temporary folder")


CHECKS: list[Check] = [
    _folder_keeps_promises,
    _disk_has_space,
    _data_path_exists,
    _network_is_trusted,
    _shared_memory_is_large,
    _files_may_be_opened,
    _home_is_writable,
]
