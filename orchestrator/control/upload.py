"""What a cluster gets of this project and of the user's own folder: little, and shown."""

from __future__ import annotations

import contextlib
import fnmatch
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ConfigError
from orchestrator.spec.paths import PROJECT_DIR

USERS_DIR = "config_dir"
_CODE = ("orchestrator", "conf", "jobs")
# Environments, histories and caches are found at any depth. Ray would heed ignore files, whose
# patterns may eat source files: what goes is decided here.
_NEVER = ("__pycache__", "*.pyc", ".git", ".venv", "venv", ".*_cache", ".gitignore", ".rayignore")
# Where passwords and tokens are kept.
_SECRET = (".env", ".env.*", ".envrc", ".netrc")
# At the top of a folder these hold data; below, they may be packages.
_NEVER_ON_TOP = ("data", "runs", "mlruns", "mlartifacts")
_LIMIT_BYTES = 50_000_000
_LARGEST = 3


@dataclass(frozen=True, slots=True)
class Upload:
    """What was put together for a cluster.

    Attributes:
        names: the folders.
        num_files: in them.
        num_bytes: of all files, before they are packed.
    """

    names: tuple[str, ...]
    num_files: int
    num_bytes: int

    def __str__(self) -> str:
        return f"{', '.join(self.names)}: {self.num_files} files, {_megabytes(self.num_bytes)}"


def stage(folder: Path, config_dir: Path | None) -> Upload:
    """Copy into a folder what a cluster needs, once it is known to be small.

    Args:
        folder: an empty one.
        config_dir: the user's own configuration and modules.

    Raises:
        ConfigError: it is not small, or a file of it cannot be copied.
    """
    files, upload = _measure(config_dir)
    for target, source in files.items():
        with _named(source):
            (folder / target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, folder / target)
    if config_dir is not None:
        (folder / USERS_DIR).mkdir(exist_ok=True)
    return upload


def contents(config_dir: Path | None) -> Upload:
    """Return what `stage` would copy; it raises the same errors."""
    return _measure(config_dir)[1]


def users_dir(code_dirs: Sequence[str]) -> Path | None:
    """Return the user's own folder of those that a job's code is imported from, if there is one."""
    return Path(code_dirs[1]) if len(code_dirs) > 1 else None


def importable(code_dirs: Sequence[str]) -> list[str]:
    """Return where a job's code is found on this host, also where it was uploaded.

    Args:
        code_dirs: where it is on the driver's host, which may be this one, or share its folders.
    """
    uploaded = PROJECT_DIR / USERS_DIR
    return [*code_dirs, *([str(uploaded)] if uploaded.is_dir() else [])]


def _measure(config_dir: Path | None) -> tuple[dict[str, Path], Upload]:
    """Return what goes where, and how much it is.

    Raises:
        ConfigError: it is not small, or not readable.
    """
    files = {
        f"{name}/{path.relative_to(PROJECT_DIR / name)}": path
        for name in _CODE
        for path in _files(PROJECT_DIR / name)
    }
    names: tuple[str, ...] = _CODE
    if config_dir is not None:
        for path in _files(config_dir, _of_data(config_dir)):
            files[f"{USERS_DIR}/{path.relative_to(config_dir)}"] = path
        names = (*_CODE, str(config_dir))
    sizes = {target: path.stat().st_size for target, path in files.items()}
    upload = Upload(names, len(sizes), sum(sizes.values()))
    if upload.num_bytes > _LIMIT_BYTES:
        largest = sorted(sizes, key=lambda target: -sizes[target])[:_LARGEST]
        told = ", ".join(f"{target} ({_megabytes(sizes[target])})" for target in largest)
        raise ConfigError(
            f"the upload of {upload} is more than {_megabytes(_LIMIT_BYTES)}; the largest: "
            f"{told}. Data belongs into data.path or data.cache_dir, which nodes see, not into "
            "--config-dir"
        )
    return files, upload


def _files(
    folder: Path, left_out: Sequence[str] = (), above: tuple[Path, ...] = ()
) -> Iterator[Path]:
    """Yield the files below a folder, also behind links; a link that leads nowhere is none.

    Args:
        folder: where they lie.
        left_out: names in this folder that are not taken.
        above: the real folders that led here.
    """
    with _named(folder):
        real = folder.resolve()
        found = sorted(folder.iterdir())
    for path in found:
        if path.name in left_out or any(
            fnmatch.fnmatch(path.name, pattern) for pattern in (*_NEVER, *_SECRET)
        ):
            continue
        with _named(path):
            is_folder, is_file = path.is_dir(), path.is_file()
        if is_file:
            yield path
        elif is_folder and path.resolve() not in (*above, real):  # a link may lead back up
            yield from _files(path, above=(*above, real))


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name a file that stands in the way of an upload."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be uploaded: {error.strerror}; make it readable or keep it elsewhere; "
            "where there is no room, set TMPDIR to a folder that has some"
        ) from error


def _of_data(config_dir: Path) -> list[str]:
    """Return the names on the top of the user's folder that hold data, not a package."""
    return [name for name in _NEVER_ON_TOP if not (config_dir / name / "__init__.py").exists()]


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
