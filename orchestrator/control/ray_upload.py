"""What Ray uploads when a driver joins a cluster of several nodes.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import ray
from ray._private.runtime_env import packaging

from orchestrator.control.ray_join import NOT_UPLOADED, PROJECT_DIR


def uploaded() -> dict[str, int] | None:
    """Return the bytes that this driver has uploaded, as `upload_sizes` does; None if nothing."""
    folder = ray.get_runtime_context().runtime_env.get("working_dir")
    if not folder:
        return None
    return upload_sizes(Path(PROJECT_DIR), NOT_UPLOADED)


def upload_sizes(folder: Path, excludes: Sequence[str]) -> dict[str, int] | None:
    """Return the bytes that Ray takes from a folder, by the first part of their paths.

    Ray 2.60 decides by these patterns and by what it finds in .gitignore and .rayignore files, and
    has no public way to tell (`_private/runtime_env/packaging.py`, `_zip_files`); of another Ray,
    without the names, nothing is known.

    Args:
        folder: the working directory of a runtime environment.
        excludes: its `excludes`.
    """
    travel = getattr(packaging, "_dir_travel", None)
    rules = getattr(packaging, "_get_excludes", None)
    if travel is None or rules is None:
        return None
    sizes: Counter[str] = Counter()

    def count(path: Path) -> None:
        if path.is_file():
            parts = path.relative_to(folder).parts
            sizes[f"{parts[0]}/" if len(parts) > 1 else parts[0]] += path.stat().st_size

    quiet = logging.Logger("upload", logging.WARNING)
    travel(folder, [rules(folder, list(excludes))], count, include_gitignore=True, logger=quiet)
    return dict(sizes)
