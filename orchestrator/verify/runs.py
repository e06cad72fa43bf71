"""The runs of a `verify`: made on this host, some at a time, and their checkpoints compared."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.control.launcher import Child, Launch, Zygote, fork, spawn
from orchestrator.control.process_group import ProcessGroup
from orchestrator.control.supervisor import Supervisor
from orchestrator.errors import OrchestratorError
from orchestrator.spec.host import local_host
from orchestrator.spec.paths import PROJECT_DIR
from orchestrator.spec.plan import Host, RunPlan
from orchestrator.spec.schema import RunConfig
from orchestrator.spec.variants import Comparison, Variant, variant_plan
from orchestrator.train import store
from orchestrator.verify.verdict import Differences, Trace

_DIFFERENCE = PROJECT_DIR / "orchestrator" / "train" / "difference.py"
_DIFFERENCE_TIMEOUT_S = 300.0
_AT_ONCE = 2  # runs at a time: each takes 0.4 GB and more, and CPUs are shared out between them


@dataclass(slots=True)
class Run:
    """One run of a comparison: what is to be done, and what came of it."""

    plan: RunPlan
    comparison: Comparison
    variant: Variant
    restore_from: Path | None = None
    trace: Trace = field(default_factory=Trace)
    wall_s: float = 0.0

    @property
    def checkpoints_dir(self) -> Path:
        """Where its variables are saved."""
        return self.plan.paths.checkpoints_dir


class Runs:
    """Makes runs on this host, some at a time."""

    def __init__(self, config: RunConfig, zygote: Zygote | None, cwd: Path, folder: Path):
        """Make none yet; `folder` takes them."""
        found = local_host()
        # With a single GPU there would be nothing to compare it with but the CPU.
        self.num_gpus = found.num_gpus if found.num_gpus >= 2 else 0
        self.folder = folder
        self._config = config
        self._zygote = zygote
        self._cwd = cwd
        self._at_once = 1 if self.num_gpus else min(_AT_ONCE, found.num_cpus)
        self.host = Host(num_cpus=found.num_cpus // self._at_once, num_gpus=self.num_gpus)
        self._threads = ThreadPoolExecutor(self._at_once, thread_name_prefix="run")
        self._supervisors: list[Supervisor] = []
        self._num_requests = 0

    def close(self) -> None:
        """End what is still running."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for supervisor in self._supervisors:
            supervisor.stop()
            supervisor.stop()  # twice: at once, without saving
        self._threads.shutdown()

    def plan(self, comparison: Comparison, variant: Variant, clip: float | None) -> Run:
        """Return a run that is still to be made."""
        plan = variant_plan(
            self._config,
            comparison,
            variant,
            clip=clip,
            host=self.host,
            cwd=self._cwd,
            folder=self.folder,
        )
        return Run(plan, comparison, variant)

    def make(self, runs: Sequence[Run]) -> None:
        """Make runs; the slowest to start come first."""
        ordered = sorted(runs, key=lambda run: -run.variant.num_workers)
        futures = [
            self._threads.submit(self._make, run, index) for index, run in enumerate(ordered)
        ]
        for future in futures:
            future.result()

    def differences(
        self, pairs: Sequence[tuple[Run, Run]], moved: Run | None = None
    ) -> tuple[list[Differences], dict[str, float]]:
        """Compare the checkpoints of pairs of runs, in a process that has TensorFlow.

        Returns:
            The differences of each pair; how far each variable of `moved` went.
        """
        self._num_requests += 1
        request = self.folder / f"difference-{self._num_requests}.json"
        asked = {
            "pairs": [[str(a.checkpoints_dir), str(b.checkpoints_dir)] for a, b in pairs],
            "moved": str(moved.checkpoints_dir) if moved is not None else "",
        }
        request.write_text(json.dumps(asked))
        log = request.with_suffix(".log")
        child = self._launch(
            Launch(
                log=log,
                sys_path=tuple(dict.fromkeys([str(PROJECT_DIR), *sys.path])),
                env={"CUDA_VISIBLE_DEVICES": ""},
                script=_DIFFERENCE,
                argv=(str(request),),
            )
        )
        try:
            ended = child.wait(_DIFFERENCE_TIMEOUT_S)
        finally:
            child.close()
        answer = request.with_suffix(".answer.json")
        if not ended or not answer.exists():
            raise OrchestratorError(f"the checkpoints could not be compared: see {log}")
        found = json.loads(answer.read_text())
        steps: list[Differences] = [
            {int(step): pair[step] for step in pair} for pair in found["pairs"]
        ]
        return steps, found["moved"]

    def _launch(self, launch: Launch) -> Child:
        return fork(self._zygote.socket_path, launch) if self._zygote else spawn(launch)

    def _make(self, run: Run, index: int) -> None:
        start = time.monotonic()
        first, last = map(int, self._config.cluster.port_range.split("-"))
        # A range of its own: a port looks free from its release until TensorFlow binds it.
        share = max(run.variant.num_workers, (last - first + 1) // 64)
        begin = min(first + index * share, last - share + 1)
        group = ProcessGroup(
            zygote=self._zygote.socket_path if self._zygote else None,
            ports=(begin, begin + share - 1),
            gpus=_visible_gpus(self.num_gpus),
        )
        run.plan.paths.checkpoints_dir.mkdir(parents=True)
        origin = run.restore_from
        supervisor = Supervisor(
            group,
            run.plan,
            observe=run.trace.observe,
            began=lambda attempt, restore_from, num_workers: run.trace.clear(),
            notice=print,
            newest_checkpoint=lambda: (store.step_of(origin), str(origin)) if origin else None,
        )
        self._supervisors.append(supervisor)
        supervisor.run()
        run.wall_s = time.monotonic() - start


def _visible_gpus(count: int) -> list[str]:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible is not None else [str(index) for index in range(count)]
