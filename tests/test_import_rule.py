"""One engine per folder, checked on the text of every file and on a real `plan`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]

TENSORFLOW = {"tensorflow", "keras", "tf_keras", "tensorflow_datasets"}
# Engine -> the only files that import it, function bodies included.
ENGINES = {
    **dict.fromkeys(TENSORFLOW, "orchestrator/train/*.py"),
    "ray": "orchestrator/control/ray_*.py",
    "mlflow": "orchestrator/track/mlflow_*.py",
    "hydra": "orchestrator/spec/config.py",
    "omegaconf": "orchestrator/spec/config.py",
    "yaml": "orchestrator/spec/config.py",
}
# Run by path in a process that has nothing of this package: it loads an exported model as whoever
# serves it does.
CLEAN_PROCESS = "orchestrator/track/mlflow_model.py"
# Folder -> what its files may import of this package; files above the folders may import all.
ALLOWED = {
    "spec": ("orchestrator.spec", "orchestrator.errors", "orchestrator.log"),
    "control": (
        "orchestrator.control",
        "orchestrator.spec",
        "orchestrator.errors",
        "orchestrator.log",
        "orchestrator.reaper",
        "orchestrator.signals",
    ),
    "train": (
        "orchestrator.train",
        "orchestrator.spec",
        "orchestrator.errors",
        "orchestrator.imports",
        "orchestrator.log",
    ),
    "track": (
        "orchestrator.track",
        "orchestrator.spec",
        "orchestrator.errors",
        "orchestrator.imports",
        "orchestrator.log",
        "orchestrator.reaper",
    ),
}
# Folders import these, so they must drag nothing in.
FOUNDATIONS = tuple(
    f"orchestrator/{name}.py" for name in ("errors", "imports", "log", "reaper", "signals")
)
# Checkpoint folders are verified and pruned by processes that never import TensorFlow.
WITHOUT_TENSORFLOW = ("orchestrator/train/store.py",)
JOBS_MAY_IMPORT = (
    "orchestrator.train.job",
    "orchestrator.train.sources",
    "orchestrator.train.data",
    "orchestrator.train.datasets",
    "orchestrator.train.draws",
    "numpy",
    "keras",
    "tensorflow",
)


def imported_names(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Yield (line, dotted name) of every import, also relative ones and import_module("…")."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            # `from orchestrator import log` names a module, `from numpy import array` does not.
            deeper = module == "orchestrator" or (node.level and not node.module)
            names = [f"{module}.{alias.name}" for alias in node.names] if deeper else [module]
            yield from ((node.lineno, name) for name in names)
        elif isinstance(node, ast.Call) and node.args:
            called = node.func
            name = getattr(called, "attr", None) or getattr(called, "id", None)
            first = node.args[0]
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def is_within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def is_standard(name: str) -> bool:
    return name.partition(".")[0] in sys.stdlib_module_names


def complaint(path: str, name: str) -> str | None:
    """Return which rule an import of `name` in the file `path` breaks, if any."""
    file = PurePosixPath(path)
    top = name.partition(".")[0]
    if file.parts[0] == "jobs":
        if is_standard(name) or is_within(name, JOBS_MAY_IMPORT):
            return None
        return "a job imports orchestrator.train.job, sources, numpy, keras and tensorflow only"
    if file.name == "__init__.py":
        return "an __init__.py imports nothing"
    if path == CLEAN_PROCESS:
        own = top == "orchestrator"
        return "the proof of an export knows nothing of this package" if own else None
    if top in ENGINES and not file.match(ENGINES[top]):
        return f"only {ENGINES[top]} imports {top}"
    if path in WITHOUT_TENSORFLOW and top in TENSORFLOW:
        return "checkpoint folders are read without TensorFlow"
    if (
        path in FOUNDATIONS
        and not is_standard(name)
        and not is_within(name, ("orchestrator.errors",))
    ):
        return "what every folder imports needs the standard library only"
    folder = file.parts[1] if len(file.parts) > 2 else None
    if folder in ALLOWED and top == "orchestrator" and not is_within(name, ALLOWED[folder]):
        return f"{folder}/ imports {', '.join(ALLOWED[folder])} only"
    if folder == "spec" and not (
        is_standard(name) or top in ("orchestrator", "hydra", "omegaconf", "yaml")
    ):
        return "spec/ needs the standard library only"
    return None


def complaints(path: str, source: str) -> list[str]:
    package = ".".join(PurePosixPath(path).parts[:-1])
    found = [(line, name, complaint(path, name)) for line, name in imported_names(source, package)]
    return [f"{path}:{line} imports {name}: {rule}" for line, name, rule in found if rule]


def python_files() -> list[str]:
    files = [*ROOT.glob("orchestrator/**/*.py"), *ROOT.glob("jobs/**/*.py")]
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


@pytest.mark.parametrize("path", python_files())
def test_every_file_keeps_the_import_rule(path: str) -> None:
    found = complaints(path, (ROOT / path).read_text(encoding="utf-8"))
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("orchestrator/driver.py", "import tensorflow as tf"),
        ("orchestrator/driver.py", "def f():\n    from ray import get"),
        ("orchestrator/driver.py", "import importlib\nimportlib.import_module('mlflow.client')"),
        ("orchestrator/control/supervisor.py", "import ray.util"),
        ("orchestrator/control/ray_group.py", "from orchestrator.train import worker"),
        ("orchestrator/control/ray_group.py", "from ..track.journal import Journal"),
        ("orchestrator/track/journal.py", "import mlflow"),
        ("orchestrator/track/journal.py", "from orchestrator import driver"),
        ("orchestrator/train/loop.py", "import omegaconf"),
        ("orchestrator/train/loop.py", "from orchestrator.control.group import WorkerGroup"),
        ("orchestrator/train/store.py", "def f():\n    import tensorflow"),
        ("orchestrator/spec/plan.py", "import numpy"),
        ("orchestrator/spec/plan.py", "from hydra import compose"),
        ("orchestrator/log.py", "import rich"),
        ("orchestrator/__init__.py", "from . import spec"),
        ("jobs/mnist.py", "from orchestrator.spec.plan import RunPlan"),
        ("jobs/mnist.py", "import mlflow"),
    ],
)
def test_the_rule_refuses(path: str, source: str) -> None:
    assert len(complaints(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("orchestrator/control/ray_group.py", "import ray\nfrom orchestrator.spec import plan"),
        ("orchestrator/track/mlflow_model.py", "import mlflow.pyfunc"),
        ("orchestrator/train/step.py", "import tensorflow as tf\nfrom . import devices"),
        ("orchestrator/spec/config.py", "def f():\n    from hydra import compose"),
        ("orchestrator/driver.py", "from orchestrator.control import supervisor\nimport rich"),
        ("jobs/mnist.py", "import keras\nfrom orchestrator.train.job import Job"),
    ],
)
def test_the_rule_allows(path: str, source: str) -> None:
    assert complaints(path, source) == []


PLAN_AND_LIST_ENGINES = """
import sys
from orchestrator.__main__ import main
code = main(["plan", "job=mnist"])
print("engines:", sorted({"tensorflow", "keras", "ray", "mlflow"} & set(sys.modules)))
sys.exit(code)
"""


def test_plan_imports_no_engine() -> None:
    command = [sys.executable, "-c", PLAN_AND_LIST_ENGINES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "engines: []"
