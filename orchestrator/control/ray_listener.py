"""Listening to agents: a poll is always open with each of them, and who is silent is lost.

An agent may let its worker run while it knows that the driver lives. Every poll therefore brings
back to the agent its own clock, as it was in the last answer that the driver has: the driver
lived *then*, and the agent ends its worker `cluster.driver_silence_s` after that moment, however
late the poll arrives. So the driver, too, knows when a worker that it cannot reach has been ended
at the latest: so long after the agent's last answer.
"""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import RayError

from orchestrator.spec.messages import Message

# How long an agent with nothing to tell holds a poll. Much less than the limits of silence.
_LONG_POLL_S = 0.5
# How often it is looked who is silent, and which nodes are drained.
_LOOK_S = 0.2
_DRAIN_LOOK_S = 1.0


@dataclass(slots=True, eq=False)
class Seat:
    """One worker's place: its actor, what is known of its node, and when it was heard.

    Attributes:
        node: what its agent told of the node.
        samples: the name under which its agent samples the node; None if it does not.
        pid: of the worker's process, on that node.
        poll: the open poll.
        stamp: the agent's clock in its last answer.
        heard: this process's clock when that answer was here.
        silent_s: how long it has been listened to in vain since.
        is_lost: whether it was listened to in vain for too long, or Ray has told its death.
    """

    worker: int
    actor: Any
    node: dict[str, Any] = field(default_factory=dict)
    samples: str | None = None
    pid: int = 0
    poll: Any = None
    stamp: float = 0.0
    heard: float = 0.0
    silent_s: float = 0.0
    is_lost: bool = False


@dataclass(frozen=True, slots=True)
class Lost:
    """An agent that is not listened to any more; `why` is the end of a sentence about it."""

    seat: Seat
    why: str
    error: RayError | None = None


@dataclass(frozen=True, slots=True)
class Drained:
    """A node that Ray wants to be left, by a Unix time; None for no limit."""

    node_id: str
    deadline: float | None


Heard = Message | Lost | Drained


class Listener:
    """A thread that keeps agents and driver assured of each other, whatever the driver does.

    The thread of the run may be busy for seconds: with placing, with a slow disk under the
    journal. Workers go on meanwhile; they end when the whole process is gone, stopped or cut off.
    """

    def __init__(self, silence_s: float):
        """Start to listen, to nobody yet.

        Args:
            silence_s: an agent that was silent for so long is lost.
        """
        self._silence_s = silence_s
        self._heard: queue.Queue[Heard | BaseException] = queue.Queue()
        self._answered: queue.SimpleQueue[tuple[Seat, Future[Any]]] = queue.SimpleQueue()
        self._looked = 0.0
        self._lock = threading.Lock()
        self._seats: list[Seat] = []
        self._known_drained: set[str] = set()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="listener", daemon=True)
        self._thread.start()
        # On its own: while Ray's head does not answer, the question takes long.
        threading.Thread(target=self._look_for_drains, name="drains", daemon=True).start()

    def add(self, seat: Seat) -> None:
        """Listen to an agent that has answered before."""
        with self._lock:
            if seat in self._seats:
                return
            self._seats.append(seat)
        self._ask(seat)

    def remove(self, seat: Seat) -> None:
        """Listen to an agent no more: from now on it knows nothing of the driver."""
        with self._lock:
            if seat in self._seats:
                self._seats.remove(seat)

    def hears(self, seat: Seat) -> bool:
        """Tell whether an agent is listened to."""
        with self._lock:
            return seat in self._seats

    def wait(self, timeout_s: float) -> list[Heard]:
        """Return what was heard, waiting for something at most so long."""
        found: list[Heard] = []
        try:
            while True:
                item = self._heard.get(timeout=0 if found else timeout_s)
                if isinstance(item, BaseException):
                    raise item
                found.append(item)
        except queue.Empty:
            return found

    def tell(self, message: Message) -> None:
        """Have something told as if an agent had told it."""
        self._heard.put(message)

    def forget_drains(self) -> None:
        """Tell of nodes that are being drained again."""
        self._known_drained = set()

    def close(self) -> None:
        """Listen to nobody any more."""
        self._is_closing.set()
        self._thread.join()

    def _listen(self) -> None:
        try:
            while not self._is_closing.is_set():
                self._look()
        except BaseException as error:
            self._heard.put(error)

    def _look(self) -> None:
        """Take what has been answered; now and then look at all, also at those that are silent.

        Waiting for the polls of all agents anew after each answer would cost the square of their
        number: every poll puts its answer into one queue instead.
        """
        with suppress(queue.Empty):
            self._take(*self._answered.get(timeout=_LOOK_S))
            for _ in range(self._answered.qsize()):
                self._take(*self._answered.get_nowait())
        now = time.monotonic()
        if now - self._looked < _LOOK_S:
            return
        # A process that was stopped itself has not listened all the time.
        listened_s = min(now - self._looked, 2 * _LOOK_S)
        self._looked = now
        with self._lock:
            seats = list(self._seats)
        for seat in seats:
            seat.silent_s += listened_s
            if seat.silent_s > self._silence_s:
                self._lose(Lost(seat, f"has not answered for {seat.silent_s:.1f} s"))

    def _ask(self, seat: Seat) -> None:
        """Open a poll; its answer comes by itself, from a thread of Ray's."""
        seat.poll = seat.actor.listen.remote(_LONG_POLL_S, seat.stamp)
        seat.poll.future().add_done_callback(lambda answer: self._answered.put((seat, answer)))

    def _take(self, seat: Seat, answer: Future[tuple[float, list[Message]]]) -> None:
        if not self.hears(seat):
            return
        try:
            seat.stamp, messages = answer.result()
        except RayError as error:
            self._lose(Lost(seat, "is gone", error))
            return
        seat.heard, seat.silent_s = time.monotonic(), 0.0
        for message in messages:
            self._heard.put(message)
        self._ask(seat)

    def _lose(self, lost: Lost) -> None:
        if self.hears(lost.seat):  # else it is being ended on purpose
            lost.seat.is_lost = True
            self.remove(lost.seat)
            self._heard.put(lost)

    def _look_for_drains(self) -> None:
        while not self._is_closing.wait(_DRAIN_LOOK_S):
            for node_id, deadline in draining_nodes().items():
                if node_id not in self._known_drained:
                    self._known_drained.add(node_id)
                    self._heard.put(Drained(node_id, deadline))


def draining_nodes() -> dict[str, float | None]:
    """Return the ids of nodes that Ray wants to be left, with the Unix time they end at.

    Ray 2.60 tells it in `_private/state.py` only, as its own Ray Train reads it; with another Ray,
    without the name, or while its head does not answer, no node seems to be drained.
    """
    from ray._private import state

    try:
        found = state.state.get_draining_nodes()
    except Exception:  # Ray raises what its C++ has: RpcError, TypeError, AttributeError …
        return {}
    return {node_id: (at_ms / 1000 if at_ms else None) for node_id, at_ms in found.items()}
