"""The update in one kernel is the update that Keras writes out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.spec.schema import Compile, OptimizerName
from orchestrator.train.fused import unfused
from orchestrator.train.step import TrainStep
from tests.train.rig import make_rig
from tests.train.tiny import Tiny

# Only real differences are visible in it.
pytestmark = pytest.mark.usefixtures("float64")


@pytest.mark.parametrize("replicas", [1, 3])
@pytest.mark.parametrize("name", [OptimizerName.adam, OptimizerName.adamw])
def test_the_fused_update_is_that_of_keras(
    tmp_path: Path, name: OptimizerName, replicas: int
) -> None:
    changes: dict[str, Any] = {
        "optimizer__name": name,
        "optimizer__learning_rate": 0.01,
        "optimizer__weight_decay": 0.1,
        "optimizer__beta_1": 0.8,
        "optimizer__epsilon": 1e-3,
        "schedule__warmup_steps": 5,
    }
    fused = make_rig(tmp_path, Tiny(), replicas=replicas, **changes).run(12)
    plain = make_rig(tmp_path, Tiny(), replicas=replicas, **changes)
    [optimizer] = plain.optimizers._optimizers.values()
    with unfused(optimizer):
        plain.run(12)
    [other] = fused.optimizers._optimizers.values()
    kinds = [_update_kinds(rig.step) for rig in (fused, plain)]
    assert kinds == [{"ResourceApplyAdam"}, set()]
    for left, right in zip(fused.weights, plain.weights, strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-14)
    for left, right in zip(other.variables, optimizer.variables, strict=True):
        np.testing.assert_allclose(left.numpy(), right.numpy(), rtol=1e-11, atol=1e-14)


def _update_kinds(step: TrainStep) -> set[str]:
    graph = step._functions[Compile.graph].get_concrete_function().graph.as_graph_def()
    nodes = {node.op for function in graph.library.function for node in function.node_def}
    return {op for op in nodes if op.startswith("ResourceApply")}
