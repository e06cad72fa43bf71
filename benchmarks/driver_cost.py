"""What the driver of many workers costs: CPU a worker-minute, requests to MLflow, seconds to react.

python -m benchmarks.driver_cost [workers=8,64,1000] [seconds=30] [agents=8,32] [profile=64]

The workers are hollow (benchmarks/hollow.py): scripted ones in this process, or threads of real
agents, which are actors on a real Ray. Driver, supervisor, journal, screen and MLflow's thread are
those of a training. `profile=N` prints where the time goes with N scripted workers.
"""

from __future__ import annotations

import contextlib
import cProfile
import io
import os
import pstats
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.hollow import Crowd
from orchestrator.control.group import WorkerGroup
from orchestrator.guardian import Guard
from orchestrator.screen import Screen
from orchestrator.signals import Stops
from orchestrator.spec.config import load_config
from orchestrator.spec.plan import Host, RunPlan, make_plan
from orchestrator.training import Training

# Importing MLflow and making its tables is over by then.
_WARM_S = 10.0


@dataclass(slots=True)
class Figures:
    """What one run cost.

    Attributes:
        cpu_s: of the driver, from `_WARM_S` on.
        wall_s: the time that took.
        requests: log_batch calls in it.
    """

    workers: int
    cpu_s: float = 0.0
    wall_s: float = 0.0
    requests: int = 0

    @property
    def cpu_per_worker_minute(self) -> float:
        """Seconds of CPU that a worker costs the driver in a minute."""
        return 60 * self.cpu_s / self.wall_s / self.workers


def plan_of(workers: int, folder: Path) -> RunPlan:
    """Return the plan of a run that only many workers make special."""
    config = load_config(
        [
            *("job=synthetic", "strategy=multi_worker", f"strategy.num_workers={workers}"),
            *(f"train.global_batch_size={32 * workers}", "train.steps=1000000"),
            *(f"data.num_examples={64 * workers}", "data.num_eval_examples=0"),
            *("export.enabled=false", "cluster.cpus_per_worker=1", "cluster.fork=false"),
            *("cluster.port_range=20000-29999", f"runs_dir={folder}"),
        ]
    )
    plan = make_plan(config, run="cost", host=Host(num_cpus=1, num_gpus=0), cwd=folder)
    plan.paths.root.mkdir(parents=True)
    return plan


def measure(
    workers: int, make: Callable[[RunPlan, threading.Event], WorkerGroup], seconds: float
) -> Figures:
    """Run a training of hollow workers and return what it cost in that many warm seconds.

    Args:
        workers: how many.
        make: makes their group, which sets the event once all are ready, and whose workers live a
            second longer than `_WARM_S` and `seconds` from then on.
        seconds: how long to measure.
    """
    figures, ready = Figures(workers), threading.Event()
    with tempfile.TemporaryDirectory(prefix="driver-cost-") as name, Stops() as stops:
        plan = plan_of(workers, Path(name))
        with (
            open(os.devnull, "w") as nowhere,
            Screen(
                [str(workers)],
                total_steps=plan.total_steps,
                global_batch_size=32,
                stream=nowhere,
                log=plan.paths.driver_log,
            ) as screen,
            _counted() as requests,
        ):
            group = make(plan, ready)
            began = time.monotonic()
            training = Training(
                plan, lambda n: plan, None, [], group, screen, stops, Guard(), began
            )
            look = (figures, requests, ready, seconds)
            watch = threading.Thread(target=_watch, args=look, daemon=True)
            watch.start()
            try:
                training.run()
            finally:
                group.close()
            watch.join()
    return figures


def _watch(figures: Figures, requests: list[float], ready: threading.Event, seconds: float) -> None:
    """Take the figures from when everything is warm."""
    ready.wait()
    time.sleep(_WARM_S)
    cpu, wall, count = time.process_time(), time.monotonic(), len(requests)
    time.sleep(seconds)
    figures.cpu_s = time.process_time() - cpu
    figures.wall_s = time.monotonic() - wall
    figures.requests = len(requests) - count


@contextlib.contextmanager
def _counted() -> Iterator[list[float]]:
    """Count what is sent to MLflow in batches."""
    from orchestrator.track import mlflow_store

    sent: list[float] = []
    send = mlflow_store.Store.send

    def counting(self: Any, points: Any) -> Any:
        sent.append(time.monotonic())
        return send(self, points)

    mlflow_store.Store.send = counting  # type: ignore[method-assign]
    try:
        yield sent
    finally:
        mlflow_store.Store.send = send  # type: ignore[method-assign]


def scripted(workers: int, seconds: float) -> Figures:
    """Measure workers that are played in this process."""

    def make(plan: RunPlan, ready: threading.Event) -> Crowd:
        ready.set()
        return Crowd([_WARM_S + seconds + 1.0])

    return measure(workers, make, seconds)


def agents(workers: int, seconds: float) -> Figures:
    """Measure workers that are threads of real agents on a Ray of their own."""
    from orchestrator.control.ray_settings import apply_ray_settings
    from orchestrator.spec.schema import ClusterName

    apply_ray_settings(ClusterName.local)
    from benchmarks.hollow_agent import LIFE, HollowGroup

    os.environ[LIFE] = str(_WARM_S + seconds + 1.0)
    return measure(
        workers, lambda plan, ready: HollowGroup(plan.config.cluster, workers, ready), seconds
    )


def failing(workers: int) -> float:
    """Return seconds from the death of all workers to the start of the next attempt."""
    life_s = 5.0
    crowd = Crowd([life_s, 3.0])
    with tempfile.TemporaryDirectory(prefix="driver-cost-") as name, Stops() as stops:
        plan = plan_of(workers, Path(name))
        with open(os.devnull, "w") as nowhere:
            screen = Screen(
                [str(workers)],
                total_steps=plan.total_steps,
                global_batch_size=32,
                stream=nowhere,
                log=plan.paths.driver_log,
            )
            with screen:
                began = time.monotonic()
                Training(plan, lambda n: plan, None, [], crowd, screen, stops, Guard(), began).run()
    return crowd.started[1] - crowd.started[0] - life_s


def main(arguments: list[str]) -> None:
    """Measure and print."""
    given = dict(argument.split("=", 1) for argument in arguments)
    seconds = float(given.get("seconds", "30"))
    if "profile" in given:
        profiler = cProfile.Profile()
        profiler.enable()
        scripted(int(given["profile"]), seconds)
        profiler.disable()
        out = io.StringIO()
        pstats.Stats(profiler, stream=out).sort_stats("tottime").print_stats(30)
        print(out.getvalue())
        return
    for key, act in (("workers", scripted), ("agents", agents)):
        for count in filter(None, given.get(key, "").split(",")):
            found = act(int(count), seconds)
            print(
                f"{key} {found.workers}: {found.cpu_per_worker_minute:.3f} s of CPU a "
                "worker-minute, "
                f"{found.cpu_s / found.wall_s:.1%} of a core, "
                f"{60 * found.requests / found.wall_s:.0f} requests a minute",
                flush=True,
            )
    for count in filter(None, given.get("failing", "").split(",")):
        print(f"failing {count}: {failing(int(count)):.2f} s to the next attempt", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
