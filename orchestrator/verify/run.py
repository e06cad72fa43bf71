"""`verify`: trains a job in several cuts and proves that all of them compute the same.

Every run is an ordinary one: its own worker processes, TF_CONFIG, collectives, checkpoints. What
is changed in the configuration, and why the limits are what they are, is in spec/variants.py; what
is changed in the model in train/substitutions.py; all of it is printed.
"""

from __future__ import annotations

import secrets
import shutil
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from orchestrator.control.launcher import Zygote, start_zygote
from orchestrator.control.preflight import run_checks
from orchestrator.driver import clean_environment
from orchestrator.errors import ConfigError, ExitCode
from orchestrator.spec.config import load_config
from orchestrator.spec.messages import Substituted
from orchestrator.spec.schema import ClusterName, RunConfig, VariantName
from orchestrator.spec.variants import (
    ONE_DEVICE,
    ONE_DEVICE_CLIPPED,
    Comparison,
    Variant,
    make_comparisons,
    make_variants,
    uneven_batch_size,
    uneven_replicas,
)
from orchestrator.train import store
from orchestrator.verify.runs import Run, Runs
from orchestrator.verify.table import substitutions, table
from orchestrator.verify.verdict import Verdict, judge, still_variables
from orchestrator.weights import find_weights

_NORM_STEPS = 5


def verify(overrides: list[str], config_dir: Path | None, cwd: Path) -> ExitCode:
    """Compare the cuts of a job.

    Args:
        overrides: as typed.
        config_dir: the user's own configuration and modules.
        cwd: what relative paths are relative to.

    Returns:
        DONE if all runs agree, else DIFFERENCE.

    Raises:
        OrchestratorError: a run could not be made.
    """
    config = load_config(overrides, config_dir)
    if config.cluster.name is ClusterName.existing:
        raise ConfigError("cluster=existing: verify compares on this host; leave it out")
    if config.resume is not None:
        raise ConfigError(f"resume={config.resume}: verify starts from step 0; leave it out")
    config.cluster.name = ClusterName.local
    for notice in clean_environment(config):
        print(notice)
    with ExitStack() as stack:
        zygote = None
        if config.cluster.fork:
            zygote = start_zygote()
            stack.callback(zygote.close)
        return verify_with(config, zygote, cwd)


def verify_with(config: RunConfig, zygote: Zygote | None, cwd: Path) -> ExitCode:
    """Compare the cuts of a job, in processes forked from a zygote or started afresh.

    Raises:
        OrchestratorError: there is nothing to compare, or a run could not be made.
    """
    start = time.monotonic()
    if not config.verify.variants:
        known = ", ".join(name.value for name in VariantName)
        raise ConfigError(f"verify.variants=[]: name what is compared: {known}")
    # Found once: the runs lie elsewhere, and so would a run of this name.
    config.train.init_from = find_weights(config, cwd)
    folder = (cwd / config.runs_dir).resolve() / config.job.name / _folder_name()
    folder.mkdir(parents=True)
    runs = Runs(config, zygote, cwd, folder)
    try:
        verdicts = _Verification(config, runs).run()
    finally:
        runs.close()
        _discard_empty(folder)
    wall_s = time.monotonic() - start
    if all(verdict.agrees for verdict in verdicts):
        shutil.rmtree(folder, ignore_errors=True)
        print(f"all {len(verdicts)} runs compute what one device computes, {wall_s:.0f} s")
        return ExitCode.DONE
    print(f"{sum(not v.agrees for v in verdicts)} of {len(verdicts)} runs differ, {wall_s:.0f} s")
    print(f"logs and checkpoints: {folder}")
    return ExitCode.DIFFERENCE


def _folder_name() -> str:
    return f"verify-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


def _discard_empty(folder: Path) -> None:
    """Remove the folder if no run has left anything in it."""
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


class _Verification:
    """The order of things: the reference first, because the others depend on what it tells."""

    def __init__(self, config: RunConfig, runs: Runs):
        self._config = config
        self._runs = runs
        self._batch = uneven_batch_size(config.train.global_batch_size, runs.num_gpus)
        self._clip: float | None = None
        self._made: dict[tuple[str, str], Run] = {}

    def run(self) -> list[Verdict]:
        """Make all runs, print what they say, return the verdicts."""
        exact = make_comparisons(self._config, has_batch_norm=False)[0]
        first = self._runs.plan(exact, ONE_DEVICE, None)
        first.plan.paths.root.mkdir(parents=True, exist_ok=True)
        for notice in run_checks(first.plan):
            print(notice)
        self._runs.make([first])
        self._made[exact.name, ONE_DEVICE.name] = first
        changed = first.trace.substituted
        has_batch_norm = bool(changed and changed.synchronised)
        comparisons = make_comparisons(self._config, has_batch_norm=has_batch_norm)
        variants = make_variants(
            self._config, num_gpus=self._runs.num_gpus, has_batch_norm=has_batch_norm
        )
        # Half the median: most steps are clipped.
        norms = list(first.trace.norm.values())[:_NORM_STEPS]
        self._clip = statistics.median(norms) / 2
        self._tell(comparisons, changed)
        rest = [
            self._runs.plan(comparison, variant, self._clip)
            for comparison in comparisons
            for variant in variants
            if (comparison.name, variant.name) not in self._made
        ]
        self._runs.make(rest)
        self._made |= {(run.comparison.name, run.variant.name): run for run in rest}
        return self._judge(comparisons, variants)

    def _tell(self, comparisons: list[Comparison], changed: Substituted | None) -> None:
        device = "GPU" if self._runs.num_gpus else "CPU"
        print(f"verify {self._config.job.name}: global batch {self._batch}, on {device} devices")
        lines = substitutions(
            self._config,
            comparisons,
            changed=changed,
            batch=self._batch,
            replicas=uneven_replicas(self._runs.num_gpus),
            clip=self._clip or 0.0,
        )
        print("in place of what the job says:")
        for line in lines:
            print(f"  {line}")

    def _judge(self, comparisons: list[Comparison], variants: list[Variant]) -> list[Verdict]:
        pairs = [
            (
                self._made[comparison.name, variant.reference],
                self._made[comparison.name, variant.name],
            )
            for comparison in comparisons
            for variant in variants
            if variant not in (ONE_DEVICE, ONE_DEVICE_CLIPPED)
        ]
        exact = self._made[comparisons[0].name, ONE_DEVICE.name]
        found, moved = self._runs.differences(pairs, exact)
        still = still_variables(moved)
        verdicts = []
        for (reference, other), steps in zip(pairs, found, strict=True):
            noise = still if other.comparison.relative else frozenset()
            verdicts.append(judge(other.comparison, reference.trace, other.trace, steps, noise))
        for comparison in comparisons:
            rows = [
                (pair, verdict)
                for pair, verdict in zip(pairs, verdicts, strict=True)
                if pair[1].comparison is comparison
            ]
            print(f"\n{comparison.title}")
            print("\n".join(table([(o.variant, v, o.wall_s) for (_, o), v in rows], self._batch)))
            if comparison.relative and still:
                print(f"  without a gradient but rounding, left out: {', '.join(sorted(still))}")
        print()
        self._tell_differences(pairs, verdicts)
        return verdicts

    def _tell_differences(self, pairs: list[tuple[Run, Run]], verdicts: list[Verdict]) -> None:
        """Say of each run that differs where it first does; of the first one, to the step."""
        is_first = True
        for (reference, other), verdict in zip(pairs, verdicts, strict=True):
            if verdict.agrees:
                continue
            if is_first:
                verdict = self._step_by_step(reference, other, verdict)
            is_first = False
            title = other.variant.title(self._batch)
            print(f"{other.comparison.name}, {title}: {verdict.story}")

    def _step_by_step(self, reference: Run, other: Run, verdict: Verdict) -> Verdict:
        """Make the steps since the last equal checkpoint again, saving after each."""
        every = other.comparison.every_steps
        assert verdict.step is not None
        start = (verdict.step - 1) // every * every
        if every == 1:
            return verdict
        end = min(start + every, other.comparison.steps)
        again = [self._from(run, start, end) for run in (reference, other)]
        self._runs.make(again)
        found, _ = self._runs.differences([(again[0], again[1])])
        closer = judge(other.comparison, again[0].trace, again[1].trace, found[0])
        return verdict if closer.agrees else closer

    def _from(self, run: Run, start: int, end: int) -> Run:
        comparison = replace(
            run.comparison, name=f"{run.comparison.name}-from-{start}", steps=end, every_steps=1
        )
        again = self._runs.plan(comparison, run.variant, self._clip)
        if start:
            again.restore_from = run.checkpoints_dir / store.checkpoint_name(start)
        return again
