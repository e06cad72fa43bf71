"""A run on real worker processes, without Ray, that a test watches and disturbs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from orchestrator.control.launcher import Zygote
from orchestrator.control.process_group import ProcessGroup
from orchestrator.control.supervisor import Supervisor
from orchestrator.resumption import Checkpoints
from orchestrator.spec.messages import BlockDone, Message, Outcome, Ready
from orchestrator.spec.plan import RunPlan
from orchestrator.spec.schema import StrategyName
from orchestrator.track.journal import read
from tests.plans import tiny_plan

_ROOT = Path(__file__).parents[2]
_PORTS = (21600, 21699)


class Training:
    """A run, and everything it told.

    Attributes:
        told: messages, in their order.
        said: notices of the driver.
        pids: of the newest attempt's workers, by index.
        step: the last that the chief finished.
    """

    def __init__(
        self,
        folder: Path,
        zygote: Zygote,
        *,
        react: Callable[[Training, Message], None] = lambda training, message: None,
        workers: int = 1,
        group: type[ProcessGroup] = ProcessGroup,
        **changes: Any,
    ):
        """Make a run of `tests.faults.paced` jobs.

        Args:
            folder: where the run folder is.
            zygote: what workers are forked from.
            react: called with every message.
            workers: how many.
            group: where they run.
            changes: of the tiny plan.
        """
        if workers > 1:
            changes |= {
                "strategy__name": StrategyName.multi_worker,
                "strategy__num_workers": workers,
            }
        changes = {
            "job__class_name": "tests.faults.paced.Paced",
            "train__steps": 200,
            "train__block_s": 0.08,
            "export__enabled": False,
            "data__num_eval_examples": 0,
            "code_dirs": [str(_ROOT)],
        } | changes
        self.plan: RunPlan = tiny_plan(folder, **changes)
        self.plan.paths.checkpoints_dir.mkdir(parents=True, exist_ok=True)
        self.told: list[Message] = []
        self.said: list[str] = []
        self.pids: dict[int, int] = {}
        self.step = 0
        self._react = react
        self.group = group(zygote=zygote.socket_path, ports=_PORTS)
        self.supervisor = Supervisor(
            self.group,
            self.plan,
            observe=self._observe,
            began=lambda attempt, restore_from, num_workers: None,
            notice=self.said.append,
            newest_checkpoint=Checkpoints(self.plan.paths, read, self.said.append).newest,
        )

    def run(self) -> Outcome:
        """Run to the end."""
        return self.supervisor.run()

    def only(self, kind: type[Message]) -> list[Any]:
        """Return what was told of a kind."""
        return [message for message in self.told if isinstance(message, kind)]

    def _observe(self, message: Message) -> None:
        self.told.append(message)
        if isinstance(message, Ready):
            self.pids[message.worker] = message.pid
        if isinstance(message, BlockDone) and message.worker == 0:
            self.step = message.first_step + message.num_steps
        self._react(self, message)
