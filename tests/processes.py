"""Runs all workers of a plan on this host, each in a process of its own, without Ray."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from orchestrator.control.folders import prepare
from orchestrator.control.launcher import Zygote
from orchestrator.control.process_group import ProcessGroup
from orchestrator.spec.messages import Death, Ended, Failed, Message
from orchestrator.spec.plan import RunPlan
from tests.control.conftest import wait_until

_PORTS = (21500, 21599)


@contextmanager
def ended_workers(
    plan: RunPlan, zygote: Zygote | None, gpus: Sequence[str] = ()
) -> Iterator[list[Message]]:
    """Give what was told until every worker had ended well; kills them afterwards."""
    socket = None if zygote is None else zygote.socket_path
    group = ProcessGroup(zygote=socket, ports=_PORTS, gpus=gpus)
    told: list[Message] = []

    def all_ended() -> bool:
        told.extend(group.poll(0.1))
        assert not [m for m in told if isinstance(m, Failed | Death)], told
        return sum(isinstance(message, Ended) for message in told) == plan.num_workers

    try:
        prepare(plan.paths, 1)
        group.start(plan, 1, None)
        wait_until(all_ended, "all workers end")
        yield told
    finally:
        group.kill()
