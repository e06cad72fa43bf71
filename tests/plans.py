"""Configurations and plans for tests, made without YAML."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from orchestrator.spec import schema as s
from orchestrator.spec.chaos import ChaosConfig
from orchestrator.spec.plan import Host, RunPlan, make_plan
from orchestrator.spec.sweep import HalvingConfig, SweepConfig


def tiny_config(**changes: Any) -> s.RunConfig:
    """Return a small valid configuration.

    Args:
        changes: dotted keys with `__` for the dot, such as `train__steps=10`.
    """
    config = s.RunConfig(
        job=s.JobConfig(name="tiny", class_name="tests.train.tiny.Tiny"),
        strategy=s.StrategyConfig(
            name=s.StrategyName.one_device,
            num_workers=1,
            min_workers=None,
            devices_per_worker="1",
            bytes_per_pack=None,
        ),
        cluster=s.ClusterConfig(
            name=s.ClusterName.local,
            address=None,
            placement=s.Placement.PACK,
            cpus_per_worker=1,
            start_timeout_s=60.0,
            driver_silence_s=4.0,
            agent_silence_s=4.0,
            fork=True,
            port_range="20000-20999",
            trusted_network=False,
            log_device_placement=False,
            soft_placement=True,
        ),
        optimizer=s.OptimizerConfig(name=s.OptimizerName.sgd, learning_rate=0.1),
        schedule=s.ScheduleConfig(
            name=s.ScheduleName.constant,
            warmup_steps=0,
            final_factor=0.0,
            boundaries=[],
            factors=[],
        ),
        data=s.DataConfig(num_examples=96, num_eval_examples=50, path=None, cache_dir="data"),
        train=s.TrainConfig(
            global_batch_size=16,
            micro_batches=1,
            epochs=None,
            steps=12,
            eval_every_epochs=None,
            eval_every_steps=None,
            seed=0,
            compile=s.Compile.auto,
            block_s=0.5,
            max_block_steps=8,
            on_nan=s.OnNan.stop,
            deterministic=False,
            max_time_s=None,
            init_from=None,
            freeze=[],
            check_numerics=False,
            profile_steps=None,
            layer_norms=False,
            audit_every_steps=None,
        ),
        best=s.BestConfig(metric=None, mode=s.BestMode.min, min_delta=0.0, patience=None),
        precision=s.PrecisionConfig(policy=s.Precision.float32),
        checkpoint=s.CheckpointConfig(every_steps=None, every_s=None, keep=3, max_failed_saves=10),
        recovery=s.RecoveryConfig(
            max_restarts=1,
            max_start_restarts=1,
            max_node_restarts=1,
            max_preemptions=1,
            backoff_s=1.0,
            max_backoff_s=60.0,
            capacity_timeout_s=600.0,
            start_patience_s=120.0,
            step_patience_s=120.0,
        ),
        tracking=s.TrackingConfig(
            uri=None,
            experiment=None,
            required=False,
            log_every_steps="auto",
            system_metrics_every_s=None,
            timeout_s=5.0,
            journal_patience_s=60.0,
        ),
        export=s.ExportConfig(enabled=True, weights=s.Weights.last, register=None, alias=None),
        verify=s.VerifyConfig(steps=20, own_steps=3, variants=list(s.VariantName)),
        chaos=ChaosConfig(
            step_ms=None, faults=[], full=False, random=None, repeat=1, seed=0, report=None
        ),
        sweep=SweepConfig(
            name=None,
            parallel="auto",
            max_children=100,
            halving=HalvingConfig(factor=None, first=0.1),
        ),
        runs_dir="runs",
        run_name=None,
        resume=None,
        resume_allow=[],
    )
    for key, value in changes.items():
        *sections, name = key.split("__")
        owner: Any = config
        for section in sections:
            owner = getattr(owner, section)
        assert name in {item.name for item in dataclasses.fields(owner)}, key
        setattr(owner, name, value)
    return config


def tiny_plan(folder: Path, *, num_gpus: int = 0, **changes: Any) -> RunPlan:
    """Return the plan of `tiny_config(**changes)` with its run folder under `folder`."""
    host = Host(num_cpus=2, num_gpus=num_gpus)
    return make_plan(tiny_config(**changes), run="20260101-000000-abcd", host=host, cwd=folder)
