"""`train.compile=auto`: graph or XLA, whichever runs a block faster here."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import Compile
from orchestrator.train.compiled import CannotCompile

# XLA is tried when at least so much time is left, and so many times what compiling takes, which is
# about 4 ms an operation: of the jobs here XLA won least with `code_lm`, 14 % in the one pair made.
_WORTH_TRYING_S = 5.0
_LEFT_PER_COMPILE = 8.0
_COMPILE_S_PER_NODE = 0.004
_TRIAL_S = 0.1
_RULES = 2  # by which a choice was made: one by other rules is made again
# `RandomIndexShuffle` is the exception: it is computed, the same everywhere.
_DRAWS = re.compile("Random(?!IndexShuffle)|Multinomial|TruncatedNormal|CandidateSampler|Dropout")


class Choice:
    """Decides once, when a block's time is known.

    Attributes:
        is_open: nothing is decided yet.
        mode: what to begin with; after a restart, what an earlier attempt found to be faster here.
    """

    def __init__(self, plan: RunPlan, state: Sequence[keras.Variable]):
        """Decide at once where there is nothing to choose.

        Args:
            plan: of the run.
            state: every variable that a block may change: a trial leaves no trace in them.
        """
        self._plan = plan
        self._state = state
        # Around a reduction XLA won nothing clear on CPUs; results differ in the last bits.
        self.is_open = (
            plan.config.train.compile is Compile.auto
            and plan.num_replicas == 1
            and not plan.config.train.deterministic
        )
        self.mode = Compile.graph
        if self.is_open and (kept := self._kept()) is not None:
            self.mode, self.is_open = kept, False
        self._last = (0, 0.0)  # steps and seconds of the last block that was not the first
        self._is_traced = False

    def observe(self, num_steps: int, wall_s: float) -> None:
        """Learn the time of a block; the first one traced and tells nothing."""
        if self._is_traced:
            self._last = (num_steps, wall_s)
        self._is_traced = True

    def decide(
        self,
        steps_left: int,
        num_steps: int,
        graph: Callable[[], Any],
        run: Callable[[Compile], None],
    ) -> tuple[Compile, str] | None:
        """Return the faster mode with a sentence about it; None as long as it is too early.

        Args:
            steps_left: of the run.
            num_steps: of the block that is run in each mode.
            graph: returns the traced block's GraphDef.
            run: runs that block in a mode, to its end.
        """
        steps, seconds = self._last
        if seconds < _TRIAL_S:
            return None
        self.is_open = False
        left_s = steps_left * seconds / steps
        if left_s < _WORTH_TRYING_S:
            return Compile.graph, ""  # too short to win compiling back: nothing to tell about
        reason = self._why_not_xla(graph(), left_s)
        if reason:
            return Compile.graph, f"train.compile=auto: graph ({reason})"
        try:
            rates = self._rates(num_steps, run)
        except CannotCompile as error:
            self._keep(Compile.graph)
            return Compile.graph, f"train.compile=auto: graph ({error})"
        best = max(rates, key=lambda mode: rates[mode])
        self._keep(best)
        shown = " against ".join(f"{rate:,.0f} steps/s as {m.value}" for m, rate in rates.items())
        return best, f"train.compile=auto: {best.value} ({shown})"

    def _kept(self) -> Compile | None:
        """Return what was chosen before in this run, on such a device."""
        try:
            kept = json.loads(self._plan.paths.compile_choice.read_text())
            return Compile(kept["mode"]) if kept["where"] == self._where() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _keep(self, mode: Compile) -> None:
        path = self._plan.paths.compile_choice
        with contextlib.suppress(OSError):  # the next attempt measures again
            path.write_text(json.dumps({"mode": mode.value, "where": self._where()}))

    def _where(self) -> list[Any]:
        plan = self._plan
        return [_RULES, platform.node(), plan.device_kind, plan.cpus_per_worker, tf.__version__]

    def _rates(self, num_steps: int, run: Callable[[Compile], None]) -> dict[Compile, float]:
        before = [tf.identity(tf.convert_to_tensor(variable.value)) for variable in self._state]
        rates = {}
        for mode in (Compile.xla, Compile.xla, Compile.graph):  # the first one compiles
            start = time.monotonic()
            try:
                run(mode)
                rates[mode] = num_steps / (time.monotonic() - start)
            except tf.errors.OpError as error:
                if mode is Compile.graph:
                    raise
                # Whatever it is, the job runs as a graph: it did so in the blocks before.
                first = (str(error.message).strip() or type(error).__name__).splitlines()[0]
                raise CannotCompile(f"under XLA it fails: {first}") from error
            finally:
                for variable, value in zip(self._state, before, strict=True):
                    variable.assign(value)
        return rates

    def _why_not_xla(self, graph: Any, left_s: float) -> str:
        """Return why XLA need not be tried; empty if it should be.

        Args:
            graph: of a block, a GraphDef.
            left_s: of the run, as a graph.
        """
        nodes = [n.op for f in graph.library.function for n in f.node_def]
        if any(_DRAWS.search(op) for op in nodes):
            # XLA's generators give other numbers for the same seed. What a run computes may not
            # depend on how long a block took.
            return "dropout and other random operations draw other numbers under XLA"
        if self._plan.device_kind == "CPU" and any("Conv" in op for op in nodes):
            return "convolutions on CPUs are slower under XLA"
        compile_s = _COMPILE_S_PER_NODE * len(nodes)
        if left_s < _LEFT_PER_COMPILE * compile_s:
            return f"{len(nodes):,} operations would take long to compile, about {compile_s:.0f} s"
        return ""
