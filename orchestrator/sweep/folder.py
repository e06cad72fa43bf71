"""What a sweep is: its children, and the folder in which they stand frozen."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from orchestrator.errors import ConfigError, StorageError
from orchestrator.spec.config import DEFAULT_RUNS_DIR
from orchestrator.spec.overrides import key_of
from orchestrator.spec.paths import SWEEPS, RunPaths, SweepPaths, typed_path
from orchestrator.spec.secrets import mask_overrides

_FORMAT = 1
_OWN_SECTION = "sweep."


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """One child of a sweep, as it was frozen.

    Attributes:
        name: its number among the children, such as `03`.
        values: of the keys that are swept.
        overrides: all of its own, as a `train` command would be given them.
        total_steps: the last step of its run.
    """

    name: str
    job: str
    run: str
    values: dict[str, str]
    overrides: list[str]
    total_steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweep that is frozen.

    Attributes:
        overrides: as typed, secrets masked, without those of the section `sweep`.
        config_dir: the user's own configuration and modules, absolute.
        cwd: what relative paths of the children are relative to.
        began: Unix seconds.
        parallel: how many children the first call ran at a time.
    """

    paths: SweepPaths
    overrides: list[str]
    config_dir: Path | None
    cwd: Path
    began: float
    parallel: int
    children: list[Child]

    @property
    def name(self) -> str:
        """The sweep's name."""
        return self.paths.root.name

    @property
    def keys(self) -> list[str]:
        """The keys that are swept."""
        return list(self.children[0].values)

    def run_of(self, child: Child) -> RunPaths:
        """Return the folder of a child's run."""
        return self.paths.run(child.job, child.run)


def own_overrides(overrides: Sequence[str]) -> list[str]:
    """Return those that say how the sweep goes about it, not what is trained."""
    return [text for text in overrides if key_of(text).startswith(_OWN_SECTION)]


def find_sweep(
    overrides: list[str],
    config_dir: Path | None,
    runs_dir: Path,
    tell: Callable[[str], None] = lambda text: None,
) -> Sweep | None:
    """Return the sweep that a command goes on with: the named one, else the newest of its kind.

    Args:
        overrides: as typed.
        config_dir: the user's own configuration and modules.
        runs_dir: the folder of runs.
        tell: takes what the user should know of sweeps that cannot be read.

    Raises:
        ConfigError: the named one is of other overrides.
        StorageError: the named one cannot be read.
    """
    own = own_overrides(overrides)
    named = [text.partition("=")[2] for text in own if key_of(text) == "sweep.name"]
    name = named[0].strip("'\"") if named and named[0] != "null" else None
    wanted = identity(overrides)
    folder = None if config_dir is None else config_dir.resolve()
    found = []
    for path in sorted((runs_dir / SWEEPS).glob("*/sweep.json")):
        try:
            found.append(read_sweep(path.parent))
        except StorageError as error:
            if path.parent.name == name:
                raise
            tell(f"note: a sweep is passed over: {error}")
    if name is not None:
        for sweep in found:
            if sweep.name != name:
                continue
            if (sweep.overrides, sweep.config_dir) != (wanted, folder):
                was = " ".join(sweep.overrides)
                raise ConfigError(
                    f"sweep.name={name}: this sweep was begun with other overrides: {was}; give "
                    "these to go on with it, or choose another name"
                )
            return sweep
        return None
    alike = [s for s in found if (s.overrides, s.config_dir) == (wanted, folder)]
    return max(alike, key=lambda sweep: sweep.began, default=None)


def typed_runs_dir(overrides: Sequence[str], cwd: Path) -> Path:
    """Return the folder of runs that a command line names, or the default one."""
    named = [text.partition("=")[2] for text in overrides if key_of(text) == "runs_dir"]
    return typed_path(named[-1].strip("'\"") if named else DEFAULT_RUNS_DIR, cwd)


def read_sweep(root: Path) -> Sweep:
    """Read a sweep's folder.

    Raises:
        StorageError: it is not readable, or of a newer version.
    """
    paths = SweepPaths(root)
    try:
        told = json.loads(paths.sweep.read_text())
        if told["format"] > _FORMAT:
            raise StorageError(
                f"{paths.sweep} is of format {told['format']}, this version reads up to {_FORMAT}; "
                "go on with the version that made it"
            )
        return Sweep(
            paths=paths,
            overrides=told["overrides"],
            config_dir=None if told["config_dir"] is None else Path(told["config_dir"]),
            cwd=Path(told["cwd"]),
            began=told["began"],
            parallel=told["parallel"],
            children=[Child(**child) for child in told["children"]],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(
            f"{paths.sweep} cannot be read: {error!r}; remove the folder and the runs of its "
            f"children ({root.name}-…) to begin again"
        ) from error


def values_text(values: dict[str, str]) -> str:
    """Return the values of a child on one line."""
    return " ".join(f"{key}={value}" for key, value in values.items())


def identity(overrides: Sequence[str]) -> list[str]:
    """Return the overrides that tell one sweep from another, secrets masked."""
    own = set(own_overrides(overrides))
    return mask_overrides([text for text in overrides if text not in own])


def write_sweep(sweep: Sweep, texts: Sequence[str]) -> None:
    """Write the folder aside, then rename it into place.

    Args:
        sweep: is to be there.
        texts: the configuration of each child, YAML.

    Raises:
        ConfigError: it is there already.
        StorageError: it cannot be made.
    """
    root = sweep.paths.root
    aside = SweepPaths(root.with_name(f".{root.name}-{os.getpid()}"))
    told = {
        "format": _FORMAT,
        "overrides": sweep.overrides,
        "config_dir": None if sweep.config_dir is None else str(sweep.config_dir),
        "cwd": str(sweep.cwd),
        "began": sweep.began,
        "parallel": sweep.parallel,
        "children": [
            {name: getattr(child, name) for name in Child.__slots__} for child in sweep.children
        ],
    }
    try:
        aside.config("x").parent.mkdir(parents=True)
        aside.log("x").parent.mkdir()
        for child, text in zip(sweep.children, texts, strict=True):
            aside.config(child.name).write_text(text)
        aside.sweep.write_text(json.dumps(told, indent=1))
        aside.root.rename(root)
    except OSError as error:
        shutil.rmtree(aside.root, ignore_errors=True)
        if root.exists():
            raise ConfigError(
                f"sweep.name={root.name}: {root} is there already; choose another name"
            ) from error
        raise StorageError(
            f"cannot make the folder {root}: {error.strerror}; set runs_dir to a folder that can "
            "be written"
        ) from error
