"""Workers on real GPUs, in processes of their own: `python -m pytest tests/gpu`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestrator.control.launcher import Zygote, start_zygote
from orchestrator.spec.host import local_host
from orchestrator.spec.messages import BlockDone, Message, Ready
from orchestrator.spec.schema import Compile, Precision, StrategyName
from tests.plans import tiny_plan
from tests.processes import ended_workers

NUM_GPUS = local_host().num_gpus
pytestmark = pytest.mark.skipif(NUM_GPUS == 0, reason="no GPU on this machine")
two_gpus = pytest.mark.skipif(NUM_GPUS < 2, reason="one GPU only")
# Float32 matrix products may run in TensorFloat-32, with 10 bits of mantissa: 1e-3 a product.
TF32 = 5e-3


@pytest.fixture(scope="module", params=[True, False], ids=["fork", "fresh"])
def zygote(request: pytest.FixtureRequest) -> Iterator[Zygote | None]:
    """A process to fork from, or none: every worker is started afresh."""
    found = start_zygote() if request.param else None
    yield found
    if found is not None:
        found.close()


def train(zygote: Zygote | None, folder: Path, *, num_gpus: int, **changes: Any) -> list[Message]:
    """Run all workers of a plan to their end."""
    plan = tiny_plan(folder, num_gpus=num_gpus, export__enabled=False, **changes)
    with ended_workers(plan, zygote, [str(index) for index in range(num_gpus)]) as told:
        return told


def losses(told: list[Message]) -> np.ndarray:
    return np.concatenate([m.loss for m in told if isinstance(m, BlockDone) and m.worker == 0])


def ledger(told: list[Message]) -> int:
    return sum(m.ledger for m in told if isinstance(m, BlockDone)) % 2**64


@pytest.mark.parametrize("mode", [Compile.graph, Compile.xla])
def test_a_gpu_computes_what_a_cpu_computes(
    zygote: Zygote | None, tmp_path: Path, mode: Compile
) -> None:
    cpu = train(zygote, tmp_path / "cpu", num_gpus=0)
    gpu = train(zygote, tmp_path / "gpu", num_gpus=1, train__compile=mode)
    [ready] = [message for message in gpu if isinstance(message, Ready)]
    assert ready.devices == ("GPU:0",)
    np.testing.assert_allclose(losses(gpu), losses(cpu), rtol=TF32)
    assert ledger(gpu) == ledger(cpu)


@pytest.mark.parametrize("precision", [Precision.mixed_bfloat16, Precision.mixed_float16])
def test_half_precision_learns(zygote: Zygote | None, tmp_path: Path, precision: Precision) -> None:
    told = train(zygote, tmp_path, num_gpus=1, precision__policy=precision, train__steps=40)
    assert np.isfinite(losses(told)).all() and losses(told)[-1] < losses(told)[0]


@two_gpus
@pytest.mark.parametrize(
    "strategy",
    [
        {"strategy__name": StrategyName.mirrored, "strategy__devices_per_worker": "2"},
        {
            "strategy__name": StrategyName.multi_worker,
            "strategy__num_workers": 2,
            "strategy__devices_per_worker": "1",
        },
    ],
    ids=["mirrored", "multi_worker"],
)
def test_two_gpus_compute_what_one_computes(
    zygote: Zygote | None, tmp_path: Path, strategy: dict[str, Any]
) -> None:
    one = train(zygote, tmp_path / "one", num_gpus=1)
    two = train(zygote, tmp_path / "two", num_gpus=2, train__audit_every_steps=4, **strategy)
    np.testing.assert_allclose(losses(two), losses(one), rtol=TF32)
    assert ledger(two) == ledger(one)
