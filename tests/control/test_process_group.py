"""Workers on this host alone, as `verify` starts them."""

from __future__ import annotations

from pathlib import Path

import psutil

from orchestrator.control.launcher import Zygote
from orchestrator.control.process_group import ProcessGroup
from orchestrator.spec.messages import Death, Ended, Failed, Message, Ready
from orchestrator.spec.schema import StrategyName
from tests.control.conftest import is_gone, wait_until
from tests.plans import tiny_plan

# Far longer than a process takes to leave.
_LEAVING_S = 1.0


def test_no_worker_leaves_before_it_is_ended(zygote: Zygote, tmp_path: Path) -> None:
    """A peer that leaves while another is in the last collective makes that one fail."""
    plan = tiny_plan(
        tmp_path,
        strategy__name=StrategyName.multi_worker,
        strategy__num_workers=2,
        export__enabled=False,
    )
    group = ProcessGroup(zygote=zygote.socket_path, ports=(21500, 21599))
    told: list[Message] = []

    def all_ended() -> bool:
        told.extend(group.poll(0.1))
        assert not [m for m in told if isinstance(m, Failed | Death)], told
        return sum(isinstance(message, Ended) for message in told) == 2

    try:
        group.start(plan, 1, None)
        wait_until(all_ended, "both workers end")
        workers = [psutil.Process(m.pid) for m in told if isinstance(m, Ready)]
        gone, alive = psutil.wait_procs(workers, timeout=_LEAVING_S)
        assert not gone and len(alive) == 2
    finally:
        group.kill()
    assert all(is_gone(worker.pid) for worker in workers)
