"""The runs that `verify` compares: the same global batch, cut in different ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.spec.plan import Host
from orchestrator.spec.schema import Compile, OptimizerName, Precision, ScheduleName, VariantName
from orchestrator.spec.variants import (
    EXACT_LIMIT,
    make_comparisons,
    make_variants,
    uneven_batch_size,
    variant_plan,
)
from tests.plans import tiny_config

# One of the cuts on a host, and one over workers.
CLIPPED = ("uneven", "multi_worker")


@pytest.mark.parametrize(
    ("batch", "num_gpus", "expected"),
    [(32, 0, 32), (33, 0, 34), (32, 2, 33), (32, 8, 32), (33, 8, 34), (1, 0, 4)],
)
def test_the_uneven_replicas_never_divide_the_batch(
    batch: int, num_gpus: int, expected: int
) -> None:
    assert uneven_batch_size(batch, num_gpus) == expected


def test_every_variant_takes_the_same_global_batch(tmp_path: Path) -> None:
    config = tiny_config(
        schedule__name=ScheduleName.cosine,
        schedule__warmup_steps=5,
        train__compile=Compile.xla,
        optimizer__name=OptimizerName.adam,
        optimizer__clip_global_norm=7.0,
    )
    host = Host(num_cpus=2, num_gpus=0)
    plans = {
        (comparison.name, variant.name): variant_plan(
            config, comparison, variant, clip=0.5, host=host, cwd=tmp_path, folder=tmp_path
        )
        for comparison in make_comparisons(config, has_batch_norm=False)
        for variant in make_variants(config, num_gpus=0, has_batch_norm=False)
    }
    cuts = {name: plan.replica_batch_sizes for (_, name), plan in plans.items()}
    assert cuts == {
        "one_device": (16,),
        "one_device_clipped": (16,),
        "mirrored": (8, 8),
        "multi_worker": (8, 8),
        "micro_batches": (16,),
        "uneven": (6, 5, 5),
    }
    assert {plan.total_steps for (name, _), plan in plans.items() if name == "exact"} == {20}
    assert len({plan.paths.root for plan in plans.values()}) == 12
    assert all(plan.verifying and plan.eval_steps == 0 for plan in plans.values())
    assert all(plan.config.train.compile is Compile.graph for plan in plans.values())
    # The job's own clipping stays where the comparison is of its own optimizer.
    clips = {key: plan.config.optimizer.clip_global_norm for key, plan in plans.items()}
    assert clips["exact", "mirrored"] is None and clips["own", "mirrored"] == 7.0
    clipped = {clips[comparison, cut] for comparison in ("exact", "own") for cut in CLIPPED}
    assert clipped == {0.5}
    # The configuration that was given is not touched.
    assert config.schedule.warmup_steps == 5 and config.optimizer.clip_global_norm == 7.0


def test_batch_normalisation_leaves_micro_batches_and_float32_out() -> None:
    config = tiny_config()
    names = [v.name for v in make_variants(config, num_gpus=0, has_batch_norm=True)]
    assert "micro_batches" not in names and "uneven" in names
    own = make_comparisons(config, has_batch_norm=True)[1]
    assert (own.precision, own.limit) == (Precision.float64, EXACT_LIMIT)


def test_lion_is_not_compared_where_rounding_noise_is_all_there_is() -> None:
    config = tiny_config(optimizer__name=OptimizerName.lion)
    assert [c.name for c in make_comparisons(config, has_batch_norm=True)] == ["exact"]
    assert len(make_comparisons(config, has_batch_norm=False)) == 2


def test_float16_is_compared_by_its_loss_scale_with_the_scale_one(tmp_path: Path) -> None:
    config = tiny_config(
        precision__policy=Precision.mixed_float16,
        precision__initial_loss_scale=1024.0,
        verify__own_steps=1,
    )
    *_, own, scaled = make_comparisons(config, has_batch_norm=False)
    assert (scaled.name, scaled.limit, scaled.precision) == ("scaled", own.limit, own.precision)
    assert scaled.steps == 3  # the one after the overflow is seen too
    host = Host(num_cpus=2, num_gpus=0)
    for comparison, expected in (
        (own, {None}),
        (scaled, {("one_device", 1.0), ("one_device_clipped", 1.0), ("uneven", 1024.0)}),
    ):
        plans = {
            variant.name: variant_plan(
                config, comparison, variant, clip=1.0, host=host, cwd=tmp_path, folder=tmp_path
            )
            for variant in make_variants(config, num_gpus=0, has_batch_norm=False)
            if variant.name in ("one_device", "one_device_clipped", "uneven")
        }
        found = {(n, p.loss_scale) if p.loss_scale else None for n, p in plans.items()}
        assert found == expected
        assert {p.overflow_step for p in plans.values()} == {2 if comparison is scaled else None}
    assert len(make_comparisons(tiny_config(), has_batch_norm=False)) == 2


def test_only_what_is_asked_for_is_compared_and_its_reference() -> None:
    config = tiny_config(verify__variants=[VariantName.mirrored])
    names = [v.name for v in make_variants(config, num_gpus=0, has_batch_norm=False)]
    assert names == ["one_device", "mirrored"]
