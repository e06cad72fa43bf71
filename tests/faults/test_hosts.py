"""Several hosts: cut cables, lost nodes, nodes that are drained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import rig
from tests.hosts import Hosts, hosts_or_skip


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Three hosts; each test leaves them as they were."""
    with hosts_or_skip(3) as made:
        yield made


def test_workers_on_two_hosts_train_over_their_cable(hosts: Hosts, tmp_path: Path) -> None:
    process = hosts.train(*rig.JOB, "strategy.num_workers=2", cwd=tmp_path)
    ended = rig.finish(process, tmp_path)
    assert ended.code == 0, ended.out
    assert len({ready["host"] for ready in rig.records(ended.run, "Ready")}) == 2
