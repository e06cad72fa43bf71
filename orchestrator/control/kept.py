"""What `make up` keeps on this host, as other commands find it: a state file for each checkout.

A checkout is its own: it has its own environment in .venv, agents import its code, and what `down`
ends is what its `up` has started. The file lies where the user's files of this login lie
($XDG_RUNTIME_DIR), is readable by the user only, and holds no secret: the token is in a file of its
own, and of the environment there are digests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from orchestrator.control.launcher import TENSORFLOW_ENV
from orchestrator.control.processes import Process
from orchestrator.control.ray_settings import SETTINGS
from orchestrator.errors import ClusterError
from orchestrator.spec.paths import PROJECT_DIR

_PACKAGES = ("tensorflow", "tensorflow-cpu", "keras", "ray", "numpy")
# What the kept processes hold of the project, or speak with it.
_LOADED = (
    *("train/zygote.py", "train/later.py", "spec/channel.py", "imports.py"),
    *("control/keeper.py", "control/ray_keeper.py"),
)
# Read when a process starts, or when Ray or TensorFlow is imported.
_VARIABLES = re.compile(
    "(TF|XLA|KERAS|CUDA|NVIDIA|NCCL|OMP|MKL|KMP|LD|MALLOC|GRPC|RAY)_.*"
    "|PYTHON(PATH|HASHSEED|HOME|OPTIMIZE)|TZ|LANG|LC_ALL"
)
_NOT_COMPARED = re.compile("RAY_(AUTH|raylet_client)_.*|RAY_ADDRESS")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A Ray and a zygote that wait for runs.

    Attributes:
        keeper: the process that owns them.
        processes: what it has started, by name.
        since: Unix time.
        control: socket of the keeper.
        zygote: socket of the zygote.
        address: of Ray's head.
        token: file with Ray's token.
        cpus: what Ray may hand out.
        gpus: the same.
        surroundings: what it was started with, see `surroundings`.
        variables: names of the environment that it was started with.
    """

    keeper: Process
    processes: dict[str, Process]
    since: float
    control: str
    zygote: str
    address: str
    token: str
    cpus: int
    gpus: int
    surroundings: dict[str, str]
    variables: list[str]


@dataclasses.dataclass(frozen=True, slots=True)
class Gone:
    """What was kept and has ended, not by `down`; `why` is a clause."""

    why: str


def state_file() -> Path:
    """Return where the state of this checkout's `up` is, in a folder that only the user reads.

    Raises:
        ClusterError: the folder belongs to somebody else.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    parent = Path(runtime) if runtime else Path(tempfile.gettempdir())
    folder = parent / ("orchestrator" if runtime else f"orch-up-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise ClusterError(f"cannot make {folder}: {error.strerror}; set XDG_RUNTIME_DIR") from None
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ClusterError(f"{folder} belongs to somebody else or is open to others; remove it")
    return folder / f"up-{hashlib.sha256(str(PROJECT_DIR).encode()).hexdigest()[:12]}.json"


def read_state(path: Path) -> Kept | Gone | None:
    """Return what a state file tells; None if there is none."""
    try:
        told = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        return Gone(f"its state file {path} cannot be read: {error}")
    if "gone" in told:
        return Gone(told["gone"])
    try:
        told["keeper"] = Process(**told["keeper"])
        told["processes"] = {name: Process(**each) for name, each in told["processes"].items()}
        return Kept(**told)
    except (TypeError, KeyError) as error:
        return Gone(f"its state file {path} is of another version: {error}")


def write_state(path: Path, state: Kept | Gone) -> None:
    """Write a state file, whole or not at all."""
    told = {"gone": state.why} if isinstance(state, Gone) else dataclasses.asdict(state)
    aside = path.with_suffix(".new")
    with open(aside, "w", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        json.dump(told, file)
    os.replace(aside, path)


def surroundings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what processes that are kept have once and for all; a difference rules them out.

    Args:
        environ: of a command. Values are kept as digests: they may be secrets.
    """
    found = {
        "Python": f"{platform.python_version()} in {sys.prefix}",
        "the CPU cores it may use": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
        "the umask": _umask(),
        "the project's own zygote": _digest(
            b"".join((PROJECT_DIR / "orchestrator" / name).read_bytes() for name in _LOADED)
        ),
    }
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    foreign = {**environ, "PYTHONPATH": _foreign_paths(environ.get("PYTHONPATH", ""))}
    for name, value in foreign.items():
        if _VARIABLES.fullmatch(name) and not _NOT_COMPARED.fullmatch(name):
            found[name] = _digest(value.encode())
    for name in (*TENSORFLOW_ENV, *SETTINGS):  # set by us, whatever they are
        found.pop(name, None)
    return found


def _foreign_paths(python_path: str) -> str:
    """Leave out the project's own folder: the children of a sweep name it, others need not."""
    paths = filter(None, python_path.split(os.pathsep))
    return os.pathsep.join(path for path in paths if Path(path) != PROJECT_DIR)


def differences(kept: Kept, own: Mapping[str, str]) -> list[str]:
    """Return the names of what is not as it was when `up` was called."""
    names = sorted({*kept.surroundings, *own})
    return [name for name in names if kept.surroundings.get(name) != own.get(name)]


def listed(names: list[str]) -> str:
    """Return names with their verb."""
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _umask() -> str:
    status = Path("/proc/self/status").read_text()
    return next((line.split()[1] for line in status.splitlines() if line[:5] == "Umask"), "")
