"""What a cluster gets of this project and of the user's own folder: little, and shown."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ConfigError
from orchestrator.spec.config import PROJECT_DIR

USERS_DIR = "config_dir"
_CODE = ("orchestrator", "conf", "jobs")
# Environments, histories and caches are found at any depth. Ray would heed ignore files, whose
# patterns may eat source files: what goes is decided here.
_NEVER = ("__pycache__", "*.pyc", ".git", ".venv", "venv", ".*_cache", ".gitignore", ".rayignore")
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
    """Copy into a folder what a cluster needs.

    Args:
        folder: an empty one.
        config_dir: the user's own configuration and modules.

    Raises:
        ConfigError: it is not small.
    """
    for name in _CODE:
        shutil.copytree(PROJECT_DIR / name, folder / name, ignore=shutil.ignore_patterns(*_NEVER))
    names: tuple[str, ...] = _CODE
    if config_dir is not None:
        shutil.copytree(config_dir, folder / USERS_DIR, ignore=_of_users(config_dir))
        names = (*_CODE, str(config_dir))
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    upload = Upload(names, len(sizes), sum(sizes.values()))
    if upload.num_bytes > _LIMIT_BYTES:
        largest = sorted(sizes, key=lambda path: -sizes[path])[:_LARGEST]
        told = ", ".join(
            f"{path.relative_to(folder)} ({_megabytes(sizes[path])})" for path in largest
        )
        raise ConfigError(
            f"the upload of {upload} is more than {_megabytes(_LIMIT_BYTES)}; the largest: "
            f"{told}. Data belongs into data.path or data.cache_dir, which nodes see, not into "
            "--config-dir"
        )
    return upload


def _of_users(config_dir: Path) -> Callable[[str, list[str]], Iterable[str]]:
    """Return what `copytree` shall leave out of the user's folder."""
    never = shutil.ignore_patterns(*_NEVER)
    top = os.fspath(config_dir)

    def ignore(folder: str, names: list[str]) -> Iterable[str]:
        left_out = set(never(folder, names))
        if folder == top:
            # A package of modules keeps such a name.
            data = [n for n in names if n in _NEVER_ON_TOP]
            left_out |= {n for n in data if not (config_dir / n / "__init__.py").exists()}
        return left_out

    return ignore


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:.1f} MB"
