"""What an agent is told to start a worker's process with.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

import pickle
from typing import Any

from orchestrator.control.ray_listener import Seat
from orchestrator.spec.messages import WorkerOrder
from orchestrator.spec.plan import RunPlan


def order_worker(
    seat: Seat,
    plan: RunPlan,
    attempt: int,
    restore_from: str | None,
    addresses: tuple[str, ...],
) -> Any:
    """Tell an agent to start its worker; return Ray's reference to the pid of the process."""
    order = WorkerOrder(
        plan=plan,
        worker=seat.worker,
        attempt=attempt,
        addresses=addresses,
        visible_gpus=seat.node["visible_gpus"] if plan.device_kind == "GPU" else "",
        restore_from=restore_from,
    )
    return seat.actor.start.remote(
        pickle.dumps(order),
        attempt,
        str(plan.paths.worker_log(attempt, seat.worker)),
        str(plan.paths.worker_stacks(attempt, seat.worker)),
        list(plan.config.code_dirs),
    )
