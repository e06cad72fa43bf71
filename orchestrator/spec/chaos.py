"""The `chaos` section of `conf/`: which faults are injected, and how the job is paced for them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class FaultName(Enum):
    """What `chaos` can do to a run; the objects that do it are in chaos/faults.py."""

    kill = "kill"
    kill_chief = "kill_chief"
    kill_both = "kill_both"
    kill_twice = "kill_twice"
    kill_in_save = "kill_in_save"
    damaged_checkpoint = "damaged_checkpoint"
    stop = "stop"
    stop_chief = "stop_chief"
    stale_chief = "stale_chief"
    sleep = "sleep"
    gil = "gil"
    sigterm = "sigterm"
    sigterm_worker = "sigterm_worker"
    driver_killed = "driver_killed"
    disk_full = "disk_full"
    tracking_down = "tracking_down"
    node_loss = "node_loss"
    cut = "cut"


@dataclass(kw_only=True, slots=True)
class ChaosConfig:
    """What `chaos` does; of training only `step_ms` is heeded, and what comes with it."""

    step_ms: float | None
    faults: list[FaultName]
    full: bool
    random: int | None
    repeat: int
    seed: int
    report: str | None
