"""Hollow workers on a real Ray, whose settings must stand before this module is imported."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from benchmarks.hollow import BEACON_S, BLOCK_S, Voice
from orchestrator.control import ray_agents
from orchestrator.control.ray_agent import RayAgent
from orchestrator.control.ray_group import RayGroup
from orchestrator.spec.messages import Message, Ready
from orchestrator.spec.schema import ClusterConfig

# Name of the variable that tells the actors for how many seconds they live.
LIFE = "HOLLOW_LIFE_S"


class HollowGroup(RayGroup):
    """A group that says when so many workers have been ready."""

    def __init__(self, config: ClusterConfig, workers: int, ready: threading.Event):
        """Make a group that sets `ready` once `workers` are."""
        super().__init__(config)
        ray_agents.RayAgent = HollowAgent  # type: ignore[misc]
        self._missing = workers
        self._all_ready = ready

    def poll(self, timeout_s: float) -> list[Message]:
        """Count who is ready."""
        messages = super().poll(timeout_s)
        self._missing -= sum(isinstance(message, Ready) for message in messages)
        if self._missing <= 0:
            self._all_ready.set()
        return messages


class HollowAgent(RayAgent):
    """An agent on Ray whose worker is a thread that tells what a worker would tell."""

    _is_over: threading.Event | None = None

    def start(self, order: bytes, attempt: int, log: str, stacks: str, sys_path: list[str]) -> int:
        """Begin to tell."""
        Path(log).parent.mkdir(parents=True, exist_ok=True)
        over = self._is_over = threading.Event()
        voice = Voice(self._worker, attempt)
        threading.Thread(target=self._tell, args=(voice, over), daemon=True).start()
        return 1

    def warm_up(self, wait: bool = False) -> None:
        """Need no TensorFlow."""

    def kill(self) -> None:
        """Tell nothing any more."""
        if self._is_over is not None:
            self._is_over.set()
        super().kill()

    def _tell(self, voice: Voice, over: threading.Event) -> None:
        now = time.monotonic()
        end = now + float(os.environ[LIFE])
        due = list(voice.events(now))
        self._deliver([voice.ready()])
        while not over.wait(max(0.0, min(due)[0] - time.monotonic())):
            when, worker, what = min(due)
            due.remove((when, worker, what))
            if time.monotonic() > end:
                self._deliver([voice.ended()])
                return
            is_block = what == "block"
            self._deliver([voice.block() if is_block else voice.beacon()])
            due.append((when + (BLOCK_S if is_block else BEACON_S), worker, what))
