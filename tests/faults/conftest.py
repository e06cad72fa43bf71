"""What holds for every fault: nothing is left behind."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.conftest import mlflow_server, ray_cluster
from tests.cluster.rig import wait_for
from tests.faults.leftovers import Leftovers

__all__ = ["mlflow_server", "ray_cluster"]

# How long what is on its way out may take: a guardian first waits whether the run goes on, then
# tells MLflow how it has ended.
_GRACE_S = 25.0


@pytest.fixture(autouse=True)
def leftovers(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Leftovers]:
    """Fail the test if its commands leave processes, ports, files or shared memory behind.

    Session fixtures, such as a cluster, are older and do not count.
    """
    tmp_path_factory.getbasetemp()  # pytest's own is not to lie in the folder that is made here
    folder = Path(tempfile.mkdtemp(prefix="f-", dir="/tmp"))  # short: sockets lie below
    monkeypatch.setenv("TMPDIR", str(folder))
    seen = Leftovers(folder)
    try:
        yield seen
        try:
            wait_for(lambda: not seen.found(), "nothing to be left", _GRACE_S)
        except AssertionError:
            pytest.fail("left behind:\n" + "\n".join(seen.found()))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
