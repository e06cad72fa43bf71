"""Workers on this host alone, as `verify` starts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil

from orchestrator.control.launcher import Zygote
from orchestrator.spec.messages import BlockDone, Notice, Ready
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import OnNan, StrategyName
from tests.control.conftest import is_gone
from tests.plans import tiny_plan
from tests.processes import ended_workers

# Far longer than a process takes to leave.
_LEAVING_S = 1.0


def two_workers(folder: Path, **changes: Any) -> RunPlan:
    return tiny_plan(
        folder,
        strategy__name=StrategyName.multi_worker,
        strategy__num_workers=2,
        export__enabled=False,
        **changes,
    )


def test_no_worker_leaves_before_it_is_ended(zygote: Zygote, tmp_path: Path) -> None:
    """A peer that leaves while another is in the last collective makes that one fail."""
    with ended_workers(two_workers(tmp_path), zygote) as told:
        workers = [psutil.Process(m.pid) for m in told if isinstance(m, Ready)]
        gone, alive = psutil.wait_procs(workers, timeout=_LEAVING_S)
        assert not gone and len(alive) == 2
    assert all(is_gone(worker.pid) for worker in workers)


def test_two_workers_go_back_to_a_checkpoint_together(zygote: Zygote, tmp_path: Path) -> None:
    plan = two_workers(
        tmp_path,
        job__class_name="tests.train.faulty.Poisoned",
        # The last example of a step is the last worker's.
        job__args={"steps": [7], "place": 15, "hidden": True},
        train__on_nan=OnNan.rollback,
        train__audit_every_steps=3,
        checkpoint__every_steps=4,
    )
    with ended_workers(plan, zygote) as told:
        pass
    [notice] = [m.text for m in told if isinstance(m, Notice) and "not finite" in m.text]
    assert "the gradient was not finite at step 7, worker 1, examples [" in notice
    assert notice.endswith("the weights are those of step 4 again")
    for worker in range(2):
        blocks = [m for m in told if isinstance(m, BlockDone) and m.worker == worker]
        assert sum(block.num_steps for block in blocks) == 12
        assert [b.skipped_steps for b in blocks if b.skipped_steps] == [(7,)]
