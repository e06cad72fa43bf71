"""TensorFlow's profiler around the steps that `train.profile_steps` names."""

from __future__ import annotations

import tensorflow as tf

from orchestrator.spec.plan import RunPlan


class Profile:
    """Records a range of steps on one worker.

    Blocks end before the first and after the last of these steps (see `Schedule.clip`), so the
    profile holds exactly these.
    """

    def __init__(self, plan: RunPlan):
        """Prepare; nothing is recorded yet."""
        self._steps = plan.profile_steps
        self._folder = plan.paths.profile_dir
        self._is_on = False

    def before(self, step: int) -> None:
        """Start when the block after `step` is within the range; also when resumed there."""
        if self._steps is None or self._is_on:
            return
        first, last = self._steps
        if first - 1 <= step < last:
            self._is_on = True
            tf.profiler.experimental.start(str(self._folder))

    def after(self, step: int) -> None:
        """Stop when the last step of the range is done."""
        if self._is_on and self._steps is not None and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        """Write what was recorded, if anything is being recorded."""
        if self._is_on:
            self._is_on = False
            tf.profiler.experimental.stop()
