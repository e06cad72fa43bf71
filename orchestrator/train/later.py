"""Puts off what Keras imports and training does not use.

Where scikit-learn and matplotlib are installed, as they are beside MLflow, `import keras` imports
them for `keras.wrappers` and `keras.visualization`: a third of the time that importing TensorFlow
takes, at the start of every worker. With the finder of this module those packages are made without
being run; whoever uses something of them runs them then, and finds what is always there.

`python -m orchestrator.train.later MODULE ARGUMENT ...` runs a module that imports Keras so.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from threading import RLock
from types import ModuleType
from typing import Any

from orchestrator.imports import uncollected

_PACKAGES = (
    "keras.visualization",
    "keras.wrappers",
    "keras.src.visualization",
    "keras.src.wrappers",
)


class _Finder(MetaPathFinder):
    """Finds the packages that are put off."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's spec with a loader that waits; None for any other module."""
        if fullname not in _PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Runs a module when the first of its names is asked for."""

    def exec_module(self, module: ModuleType) -> None:
        """Let the module wait."""
        lock, run = RLock(), super().exec_module

        def first_use(name: str) -> Any:
            # Whoever looks through all modules asks each for its file, and uses none.
            if name.startswith("__"):
                raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
            with lock:  # another thread may be running it
                if vars(module).pop("__getattr__", None) is not None:
                    run(module)
            return getattr(module, name)

        vars(module)["__getattr__"] = first_use


def put_off() -> None:
    """Put them off in this process, where Keras is not imported yet."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


if __name__ == "__main__":
    put_off()
    with uncollected():
        import keras  # noqa: F401  what is run needs it, and TensorFlow with it
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
