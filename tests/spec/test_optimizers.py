"""Every optimizer has its file, takes its own arguments only, and says if it is unproven."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.errors import ConfigError
from orchestrator.spec.config import list_group, load_config
from orchestrator.spec.describe import describe, headline
from orchestrator.spec.paths import PROJECT_DIR
from orchestrator.spec.schema import OptimizerName
from orchestrator.spec.validate import ACCEPTED, ARGUMENTS
from tests.plans import tiny_plan

VALUES = {"nesterov": "true"}


def test_every_optimizer_has_a_file_and_every_file_an_optimizer() -> None:
    assert sorted(list_group("optimizer")) == sorted(name.value for name in OptimizerName)
    assert set(ACCEPTED) == set(OptimizerName)


@pytest.mark.parametrize("name", list(OptimizerName), ids=lambda name: name.value)
def test_an_argument_that_an_optimizer_does_not_take_is_refused_with_those_it_takes(
    name: OptimizerName,
) -> None:
    lines = (PROJECT_DIR / "conf" / "optimizer" / f"{name.value}.yaml").read_text().splitlines()
    given = [f"optimizer.{argument}={VALUES.get(argument, '0.5')}" for argument in ARGUMENTS]
    with pytest.raises(ConfigError) as caught:
        load_config(["job=mnist", f"optimizer={name.value}", *given])
    told = str(caught.value).splitlines()
    takes = ", ".join(sorted(ACCEPTED[name]))
    refused = [argument for argument in ARGUMENTS if argument not in ACCEPTED[name]]
    assert told == [
        f"optimizer.{argument}={VALUES.get(argument, '0.5').title()}: {name.value} has no "
        f"{argument}; it takes {takes}"
        for argument in refused
    ]
    # The file says the same.
    noted = [line.split(":")[0] for line in lines if "not an argument of this optimizer" in line]
    assert noted == refused


def test_an_optimizer_that_no_test_proves_is_told_by_the_plan_and_the_run(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, optimizer__name=OptimizerName.lamb)
    line = (
        "optimizer lamb: not proven by this project's tests; make verify conf=tiny with the same "
        "args proves it for this job"
    )
    assert f"hint: {line}\n" in describe(plan)
    assert line in headline(plan)
    for name in OptimizerName:
        told = describe(tiny_plan(tmp_path, optimizer__name=name))
        assert ("not proven" in told) != name.is_proven
