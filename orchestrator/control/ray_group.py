"""WorkerGroup on Ray: agents are actors, one for each bundle of one placement group.

Call `ray_settings.apply_ray_settings` before this module is imported.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import ray

from orchestrator.control.addresses import chosen_address
from orchestrator.control.agent import Agent
from orchestrator.control.holding import Hold
from orchestrator.control.launcher import Zygote
from orchestrator.control.policy import Room
from orchestrator.control.ray_agents import Agents
from orchestrator.control.ray_answers import answers
from orchestrator.control.ray_checks import (
    check_authentication,
    check_nodes,
    clock_warning,
    unfit,
)
from orchestrator.control.ray_join import join, join_kept
from orchestrator.control.ray_listener import Drained, Listener, Lost, Seat
from orchestrator.control.ray_lost import Fences, death_of, told_to_leave
from orchestrator.control.ray_nodes import bundle_of
from orchestrator.control.ray_orders import order_worker
from orchestrator.control.ray_places import Places
from orchestrator.control.ray_samplers import Samplers
from orchestrator.control.ray_start import LOOPBACK, start_local
from orchestrator.errors import ClusterError, StartFailed
from orchestrator.reaper import Reaper
from orchestrator.spec.messages import (
    NO_ATTEMPT,
    Cause,
    Death,
    Message,
    Notice,
    Request,
)
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import ClusterConfig, ClusterName, Code, StrategyName

Timed = Callable[[str], AbstractContextManager[Any]]

_PROOF_TIMEOUT_S = 300.0


class RayGroup:
    """Workers on a Ray cluster: one started for this run, or one that exists.

    Agents stay between attempts, only their processes are replaced; an agent that is lost is
    replaced with the next attempt. Where the number of workers changes, or a node is gone or to be
    avoided, all are placed again.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        zygote: Zygote | None = None,
        hold: Hold | None = None,
        timed: Timed = lambda _: nullcontext(),
        notice: Callable[[str], None] = lambda _: None,
    ):
        """Do nothing yet.

        Args:
            config: how to reach Ray.
            zygote: of this node, for a local cluster; it outlives the group.
            hold: on a Ray and a zygote that are kept, for a local cluster.
            timed: shows a phase while a block runs.
            notice: shown to the user.
        """
        self._config = config
        self._kept = hold.kept if hold is not None else None
        if hold is not None:
            self._agents = Agents(config, Path(hold.kept.zygote), hold.surroundings)
        else:
            self._agents = Agents(config, zygote.socket_path if zygote is not None else None, None)
        self._timed = timed
        self._attempt = 0
        self._has_begun = False
        self._plan: RunPlan | None = None
        self._places = Places(config, notice)
        self._samplers = Samplers()
        self._seats: dict[int, Seat] = {}
        self._addresses: tuple[str, ...] = ()
        self._listener: Listener | None = None
        self._reaper: Reaper | None = None
        self._fences = Fences(config.driver_silence_s, is_local=self._is_local)

    def start(
        self,
        plan: RunPlan,
        attempt: int,
        restore_from: str | None,
        avoid: frozenset[str] = frozenset(),
    ) -> None:
        """Place an agent for each worker, then start every worker's process.

        Raises:
            ClusterError: Ray is not there, or has not what the plan asks for.
            StartFailed: a worker's process could not be started.
        """
        self._plan, self._attempt = plan, attempt
        if not ray.is_initialized():
            starts = self._is_local and self._kept is None
            with self._timed("starting Ray" if starts else "joining Ray"):
                self._initialise(plan)
        if self._listener is None:
            self._listener = Listener(self._config.agent_silence_s)
        for seat in self._ordered:
            if seat.is_lost:  # between attempts: no worker was with it
                self._give_up(seat)
        self._fences.forget()
        with self._timed("placing workers"):
            self._place(plan, avoid)
            self._describe_nodes()
            self._attend()
            self._samplers.assign(self._ordered, plan.config.tracking.system_metrics_every_s)
        with self._timed("importing TensorFlow"):
            self._get({seat.worker: seat.actor.warm_up.remote() for seat in self._ordered})
            self._start_processes(plan, attempt, restore_from)
        self._has_begun = True

    def capacity(self, plan: RunPlan) -> Room:
        """Tell how many workers fit on each host that is alive and answers."""
        if self._is_local or not ray.is_initialized():
            return Room({socket.gethostname(): plan.num_workers})
        return self._places.room(plan)

    def hosts(self) -> dict[int, str]:
        """Return the names of the hosts that workers were placed on."""
        return self._places.hosts()

    def prepare(self, plan: RunPlan) -> bool:
        """Let TensorFlow be imported where there is room but no worker; tell whether it is."""
        return self._agents.warm(plan, self._places.spare_nodes(plan))

    def poll(self, timeout_s: float) -> list[Message]:
        """Wait until any agent has heard something; a lost agent is a `Death`."""
        if self._listener is None:
            time.sleep(timeout_s)
            return []
        messages: list[Message] = []
        for heard in self._listener.wait(timeout_s):
            if isinstance(heard, Drained):
                messages += told_to_leave(heard, self._ordered, self._attempt)
            elif not isinstance(heard, Lost):
                messages += [heard] if heard.attempt in (self._attempt, NO_ATTEMPT) else []
            elif self._seats.get(heard.seat.worker) is heard.seat:
                messages.append(self._agent_lost(heard))
        return messages

    def request(self, request: Request) -> None:
        """Ask every worker for something."""
        for seat in self._ordered:
            seat.actor.request.remote(request)

    def where(self, worker: int) -> str:
        """Return a worker's node, with its address if it has one."""
        seat = self._seats.get(worker)
        host = str(seat.node.get("host", "")) if seat is not None else ""
        return f"{host} ({self._addresses[worker]})" if self._addresses else host

    def prove_export(self) -> None:
        """Run the clean-process check of the export on the chief's node."""
        assert self._plan is not None
        paths = self._plan.paths
        log = paths.worker_log(self._attempt, 0).with_name("export-proof.log")
        if 0 not in self._seats:
            raise StartFailed("the chief's agent was lost before the exported model was proven")
        proof = self._seats[0].actor.prove_export.remote(str(paths.export_dir), str(log))
        with self._timed("proving the export"):
            self._get({0: proof}, limit_s=_PROOF_TIMEOUT_S)

    def kill(self) -> None:
        """End all processes of the attempt; returns when they are proven gone."""
        self._fences.end_all(self._ordered, self._give_up)

    def close(self) -> None:
        """Give everything back: actors, placement group, Ray if it was started here."""
        try:
            if self._listener is not None:
                self._listener.close()
            if ray.is_initialized():
                self._agents.end_warming()
                self._leave()
                ray.shutdown()
            if self._reaper is not None:
                self._reaper.close()
        finally:
            self._seats, self._listener, self._reaper = {}, None, None

    def _give_up(self, seat: Seat) -> None:
        """Turn from an agent that does not answer: it shall hear nothing that keeps its worker."""
        assert self._listener is not None
        self._listener.remove(seat)
        ray.kill(seat.actor)
        self._seats.pop(seat.worker, None)
        self._fences.lose(seat)
        self._places.suspect(seat.worker)

    @property
    def _is_local(self) -> bool:
        return self._config.name is ClusterName.local

    @property
    def _ordered(self) -> list[Seat]:
        return [self._seats[worker] for worker in sorted(self._seats)]

    def _initialise(self, plan: RunPlan) -> None:
        if self._kept is not None:
            join_kept(self._kept)
        elif self._is_local:
            bundle = bundle_of(plan)
            self._reaper = start_local(
                int(plan.num_workers * bundle["CPU"]), int(plan.num_workers * bundle.get("GPU", 0))
            )
        else:
            join(self._config)

    def _place(self, plan: RunPlan, avoid: frozenset[str]) -> None:
        """Have an agent for each worker, on nodes that are alive and not to be avoided."""
        self._agents.end_warming()
        if not self._places.hold(plan, avoid):
            self._leave()
            self._places.take(plan, avoid)
        for worker in range(plan.num_workers):
            if worker not in self._seats:
                self._seats[worker] = self._seat(plan, worker)

    def _leave(self) -> None:
        """End the agents and give their places back."""
        for seat in self._ordered:
            if self._listener is not None:
                self._listener.remove(seat)
            ray.kill(seat.actor)
        self._seats = {}
        self._places.release()

    def _attend(self) -> None:
        """Begin to listen to the agents that are new, and to tell them that the driver lives."""
        assert self._listener is not None
        self._listener.forget_drains()
        unheard = [seat for seat in self._ordered if not self._listener.hears(seat)]
        asked = time.time()
        clocks = self._get({seat.worker: seat.actor.clocks.remote() for seat in unheard})
        answered = time.time()
        for seat, (stamp, unix_time) in zip(unheard, clocks, strict=True):
            seat.stamp, seat.heard = stamp, time.monotonic()
            self._listener.add(seat)
            if text := clock_warning(seat.node["host"], unix_time, asked, answered):
                notice = Notice(worker=seat.worker, attempt=self._attempt, time=answered, text=text)
                self._listener.tell(notice)

    def _seat(self, plan: RunPlan, worker: int) -> Seat:
        """Put an agent into a worker's bundle."""
        bundle = bundle_of(plan)
        actor = self._agents.make(
            plan,
            worker,
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=self._places.strategy(worker),
        )
        return Seat(worker, actor)

    def _describe_nodes(self) -> None:
        # Elsewhere the nodes see this checkout, or were brought a copy of it.
        with_project = not self._is_local and self._config.code is Code.installed
        nodes = self._get(
            {s.worker: s.actor.describe_node.remote(with_project) for s in self._ordered}
        )
        for seat, node in zip(self._ordered, nodes, strict=True):
            seat.node = node
        if not (self._is_local or self._config.allow_unauthenticated):
            check_authentication(nodes)
        own = Agent.describe_here(with_project)
        try:
            check_nodes(own, nodes, self._config.interface)
        except ClusterError as error:
            if not self._has_begun:
                raise
            raise unfit(error, own, nodes) from error

    def _start_processes(self, plan: RunPlan, attempt: int, restore_from: str | None) -> None:
        self._addresses = self._reserve_addresses(plan)
        starting = {
            seat.worker: order_worker(seat, plan, attempt, restore_from, self._addresses)
            for seat in self._ordered
        }
        for seat, pid in zip(self._ordered, self._get(starting), strict=True):
            seat.pid = pid

    def _reserve_addresses(self, plan: RunPlan) -> tuple[str, ...]:
        """Reserve a port for each worker, where TensorFlow needs one.

        One after another: agents of one node must not try the same one at once.
        """
        if plan.config.strategy.name is not StrategyName.multi_worker:
            return ()
        first, last = map(int, self._config.port_range.split("-"))
        addresses = []
        for seat in self._ordered:
            (port,) = self._get({seat.worker: seat.actor.reserve_port.remote(first, last)})
            host = LOOPBACK if self._is_local else chosen_address(seat.node, self._config.interface)
            addresses.append(f"{host}:{port}")
        return tuple(addresses)

    def _agent_lost(self, lost: Lost) -> Death:
        assert self._plan is not None
        seat = lost.seat
        log = self._plan.paths.worker_log(self._attempt, seat.worker)
        self._give_up(seat)
        return death_of(lost, self._attempt, log, self._cause_of(lost))

    def _cause_of(self, lost: Lost) -> Cause:
        """Tell an agent that died from a node that is gone, or was taken away with notice."""
        if getattr(lost.error, "preempted", False):
            return Cause.preemption
        return Cause.worker if self._places.answers(lost.seat.worker) else Cause.node

    def _get(self, refs: dict[int, Any], limit_s: float | None = None) -> list[Any]:
        """Return what the agents of some workers answer, in this order.

        Raises:
            StartFailed: one does not.
        """
        try:
            return answers(refs, limit_s or self._config.start_timeout_s)
        except StartFailed as error:
            if error.worker is not None:
                self._places.suspect(error.worker)
            raise
