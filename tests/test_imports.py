"""Large imports are left out of garbage collection, and nothing else is."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest

from orchestrator.imports import uncollected


class Ring:
    """Garbage that only the collector finds."""

    def __init__(self) -> None:
        self.me = self


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    yield
    gc.enable()


def test_what_a_block_makes_is_never_looked_through_again() -> None:
    with uncollected():
        assert not gc.isenabled()
        inside = weakref.ref(Ring())
    assert gc.isenabled()
    outside = weakref.ref(Ring())
    gc.collect()
    assert inside() is not None and outside() is None


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ImportError), uncollected():
        raise ImportError
    assert gc.isenabled()


def test_whoever_switched_the_collector_off_finds_it_off() -> None:
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()


def test_two_threads_that_import_at_once_leave_it_on() -> None:
    first, second = uncollected(), uncollected()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    second.__exit__(None, None, None)
    assert gc.isenabled()


COUNT = """
import gc
passes = []
gc.callbacks.append(lambda phase, info: passes.append(phase))
{}
print(sum(phase == "start" for phase in passes), gc.isenabled())
"""


@pytest.mark.parametrize(
    "imports",
    [
        "from orchestrator.train.zygote import _import_tensorflow as f; passes.clear(); f()",
        "from orchestrator.track.mlflow_client import open_client as f; passes.clear()\n"
        "f('sqlite:///runs.db', 5.0)",
    ],
    ids=["TensorFlow", "MLflow"],
)
def test_no_garbage_is_looked_for_while_it_is_imported(imports: str, tmp_path: object) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT.format(imports)],
        cwd=str(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "True"]
