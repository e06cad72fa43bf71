"""Faults of distributed training, each planted in the worker's process that calls it."""

import dataclasses

import keras
import tensorflow as tf


def keras_clips():
    """Clip where Keras's `global_clipnorm` does: on each replica, before the sum."""
    from orchestrator.train.replica import Replicas
    from orchestrator.train.step import TrainStep

    init, share = TrainStep.__init__, Replicas.share

    def init_without_clipping(self, plan, *args, **kwargs):
        config = plan.config.optimizer
        self.limit, config.clip_global_norm = config.clip_global_norm, None
        init(self, plan, *args, **kwargs)
        limit = self.limit and self.limit / plan.num_replicas
        self._replicas.clip = keras.optimizers.SGD(global_clipnorm=limit)._clip_gradients

    def clipped_share(self, *args):
        made = share(self, *args)
        return dataclasses.replace(made, gradients=self.clip(made.gradients))

    TrainStep.__init__, Replicas.share = init_without_clipping, clipped_share


def reduced_twice():
    """Let Keras add up over the replicas what is added up already."""
    from orchestrator.train.optimizer import Optimizers

    init = Optimizers.__init__

    def init_as_keras_is(self, *args):
        init(self, *args)
        for optimizer in self._optimizers.values():
            del optimizer._all_reduce_sum_gradients

    Optimizers.__init__ = init_as_keras_is


def lost_shard():
    """Let the second replica train on the first one's examples."""
    from orchestrator.train import making

    make = making.make_shards

    def make_without_second(sizes, replicas):
        shards = make(sizes, replicas)
        return [
            dataclasses.replace(shard, offset=0) if replica == 1 else shard
            for replica, shard in zip(replicas, shards, strict=True)
        ]

    making.make_shards = make_without_second


def replica_mean():
    """Divide the loss by the batch of the replica instead of the global batch."""
    from orchestrator.train.replica import Replicas

    share = Replicas.share

    def scaled_share(self, local, step, raw, scale):
        return share(self, local, step, raw, scale * self._plan.num_replicas)

    Replicas.share = scaled_share


def dropout_stays():
    """Leave random layers as they are."""
    from orchestrator.train import substitutions

    substitutions._silence = lambda layer: False


def tape_is_blind():
    """Forget the first variable's gradient on every replica but the first."""
    from orchestrator.train.replica import Replicas

    share = Replicas.share

    def blind_share(self, local, *args):
        made = share(self, local, *args)
        if local == 0:
            return made
        first, *others = made.gradients
        return dataclasses.replace(made, gradients=[tf.zeros_like(first), *others])

    Replicas.share = blind_share


def never_unscaled():
    """Leave the loss scale in the gradient."""
    from orchestrator.train.update import Update

    factor = Update.factor

    def scaled_factor(self, sums):
        scale = self._optimizers.loss_scale
        made = factor(self, sums)
        return made if scale is None else made * tf.cast(scale.value, made.dtype)

    Update.factor = scaled_factor


def first_scale_stays():
    """Divide by the loss scale that training began with."""
    from orchestrator.train.update import Update

    init, factor = Update.__init__, Update.factor

    def init_with_first(self, plan, *args):
        init(self, plan, *args)
        self.first_scale = plan.loss_scale

    def stale_factor(self, sums):
        scale, made = self._optimizers.loss_scale, factor(self, sums)
        return made if scale is None else made * tf.cast(scale.value / self.first_scale, made.dtype)

    Update.__init__, Update.factor = init_with_first, stale_factor


def decided_by_the_first_replica():
    """Decide about an update as a replica does that looks at its own gradient, which is finite."""
    from orchestrator.train.step import TrainStep

    squares = TrainStep._squares

    def local_squares(self, gradients, *, compiled):
        reduced = squares(self, gradients, compiled=compiled)
        if self._plan.num_replicas == 1:
            return reduced
        return tf.where(tf.math.is_finite(reduced), reduced, tf.ones_like(reduced))

    TrainStep._squares = local_squares


FAULTS = {
    fault.__name__: fault
    for fault in (
        keras_clips,
        reduced_twice,
        lost_shard,
        replica_mean,
        dropout_stays,
        tape_is_blind,
        never_unscaled,
        first_scale_stays,
        decided_by_the_first_replica,
    )
}
