"""Rules between the keys that say how training begins, ends and what is left of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from orchestrator.spec.schema import Compile, OnNan, RunConfig, Weights

_REGISTERED = re.compile(r"[^/:'\"%\x00-\x1f]+")
_ALIAS = re.compile(r"[A-Za-z0-9_\-]+")
_RESERVED_ALIAS = re.compile(r"latest|v\d+", re.IGNORECASE)
_STEPS = re.compile(r"(\d{1,12})-(\d{1,12})")


def train_rules(config: RunConfig) -> Iterator[str]:
    """Yield a line for each broken rule: value, rule, key."""
    yield from _best(config)
    yield from _registration(config)
    train = config.train
    if train.max_time_s is not None and not (
        train.max_time_s > 0 and math.isfinite(train.max_time_s)
    ):
        yield f"train.max_time_s={train.max_time_s}: must be a number greater than 0"
    if train.check_numerics and train.compile is Compile.xla:
        yield "train.check_numerics=true with train.compile=xla: XLA cannot stop at an operation"
    if train.init_from is not None and not train.init_from.strip():
        yield f"train.init_from={train.init_from!r}: name a run, a checkpoint folder or a file"
    if config.export.weights is Weights.ema and config.optimizer.ema_decay is None:
        yield "export.weights=ema without a moving average: set optimizer.ema_decay, such as 0.999"
    saves = config.checkpoint.every_steps is not None or config.checkpoint.every_s is not None
    if train.on_nan is OnNan.rollback and not saves:
        yield (
            "train.on_nan=rollback without checkpoints to go back to: set checkpoint.every_steps "
            "or checkpoint.every_s"
        )
    if train.profile_steps is not None:
        try:
            parse_profile_steps(train.profile_steps)
        except ValueError as error:
            yield str(error)


def parse_profile_steps(text: str) -> tuple[int, int]:
    """Return the first and the last step to profile, counted from 1.

    Raises:
        ValueError: the text is not FIRST-LAST with 1 <= FIRST <= LAST.
    """
    match = _STEPS.fullmatch(text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(
            f"train.profile_steps={text}: must be FIRST-LAST with 1 <= FIRST <= LAST, such as "
            "100-120"
        )
    return int(match[1]), int(match[2])


def _best(config: RunConfig) -> Iterator[str]:
    best = config.best
    if not (best.min_delta >= 0 and math.isfinite(best.min_delta)):
        yield f"best.min_delta={best.min_delta}: must be a number, at least 0"
    if best.patience is not None and best.patience < 1:
        yield f"best.patience={best.patience}: must be at least 1"
    if best.metric is None:
        if best.patience is not None:
            yield f"best.patience={best.patience} without best.metric: set it, such as loss"
        if config.export.weights is Weights.best:
            yield "export.weights=best without best.metric: set it, such as loss"
        return
    if config.data.num_eval_examples == 0:
        yield (
            f"best.metric={best.metric} with data.num_eval_examples=0: there are no evaluations "
            "to choose from"
        )
    train = config.train
    if train.eval_every_epochs is None and train.eval_every_steps is None and best.patience:
        yield (
            f"best.patience={best.patience} with evaluation at the end only: set "
            "train.eval_every_steps or train.eval_every_epochs"
        )


def _registration(config: RunConfig) -> Iterator[str]:
    """Refuse what MLflow's registry would refuse when training is over."""
    name, alias = config.export.register, config.export.alias
    # MLflow 3.17 takes quotes, and then cannot search for the name.
    if name is not None and not (name.strip() and _REGISTERED.fullmatch(name)):
        yield (
            f"export.register={name!r}: MLflow allows neither / nor : in it; a name of letters, "
            "digits, blanks, `_`, `-` and `.` is sure to work"
        )
    if alias is None:
        return
    if name is None:
        yield f"export.alias={alias} without a registered model: set export.register=NAME"
    # What mlflow.utils.validation has for aliases (3.17).
    if not _ALIAS.fullmatch(alias) or _RESERVED_ALIAS.fullmatch(alias):
        yield (
            f"export.alias={alias}: letters, digits, `_` and `-` only, and neither `latest` nor "
            "like a version, such as v2"
        )
