"""The train command as `chaos` sees it, in this process and without Ray: it starts in a second."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from orchestrator.chaos.command import Command
from orchestrator.control.agent import Agent
from orchestrator.control.launcher import Zygote
from orchestrator.control.process_group import ProcessGroup
from orchestrator.control.supervisor import Supervisor
from orchestrator.runs import merge_overrides
from orchestrator.spec.config import load_config
from orchestrator.spec.host import local_host
from orchestrator.spec.messages import Message, to_record
from orchestrator.spec.plan import RunPlan, make_plan
from orchestrator.track.journal import Journal
from orchestrator.train import store

MINE = Path(__file__).parent / "mine"
PORTS = (21600, 21699)


class Here(Command):
    """Trains with real worker processes and a real journal; nothing goes to MLflow."""

    zygote: Zygote
    has_record = False

    def start(self, *more: str) -> None:
        given = [text for text in self.arguments if not text.startswith("--")]
        config = load_config(merge_overrides(given, list(more)), MINE)
        assert config.run_name is not None
        self.plan = make_plan(config, run=config.run_name, host=local_host(), cwd=self.cwd)
        self.plan.paths.checkpoints_dir.mkdir(parents=True)
        self.journal = Journal(self.plan.paths.journal)
        self.told: list[str] = []
        self.ended: int | None = None
        self.group = self.make_group()
        self.supervisor = self.make_supervisor(self.plan)
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def make_group(self) -> ProcessGroup:
        return ProcessGroup(zygote=self.zygote.socket_path, ports=PORTS)

    def make_supervisor(self, plan: RunPlan) -> Supervisor:
        return Supervisor(
            self.group,
            plan,
            observe=self.observe,
            began=self.began,
            notice=self.told.append,
            newest_checkpoint=self.newest_checkpoint,
        )

    def run(self) -> None:
        facts = {"params": {"run": self.plan.run}, "tags": {}}
        self.journal.append({"kind": "RunStarted", "time": time.time(), "facts": facts})
        status, code = "FAILED", 1
        try:
            self.supervisor.run()
            status, code = "FINISHED", 0
        except Exception as error:
            self.told.append(str(error))
        self.journal.append({"kind": "RunEnded", "time": time.time(), "status": status})
        self.ended = code

    def observe(self, message: Message) -> None:
        self.journal.append(to_record(message))

    def began(self, attempt: int, restore_from: str | None, num_workers: int) -> None:
        self.journal.append(
            {
                "kind": "AttemptStarted",
                "time": time.time(),
                "attempt": attempt,
                "restore_from": restore_from,
                "num_workers": num_workers,
            }
        )

    def newest_checkpoint(self) -> tuple[int, str] | None:
        path = store.newest_valid(self.plan.paths.checkpoints_dir).path
        return None if path is None else (store.step_of(path), str(path))

    @property
    def code(self) -> int | None:
        return self.ended

    def tail(self, num_lines: int = 12) -> str:
        return "\n".join(self.told[-num_lines:])

    def leftovers(self, patience_s: float) -> list[str]:
        return []

    def close(self) -> None:
        self.supervisor.stop()
        self.supervisor.stop()  # twice: at once
        self.thread.join()
        self.journal.close()


class CutOff(Here):
    """Ends no process that is stopped, as if its host could not be reached."""

    def make_group(self) -> ProcessGroup:
        return _CutOffGroup(zygote=self.zygote.socket_path, ports=PORTS)

    def close(self) -> None:
        super().close()
        assert isinstance(self.group, _CutOffGroup)
        self.group.reach()


class _CutOffGroup(ProcessGroup):
    _lost: tuple[Agent, ...] = ()

    def kill(self) -> None:
        for agent in self._agents[1:]:
            agent.kill()
        self._lost += tuple(self._agents[:1])
        self._agents = []

    def reach(self) -> None:
        for agent in self._lost:
            agent.kill()


def planted(kind: type[Here], zygote: Zygote) -> type[Here]:
    """Return a command of that kind whose workers are forked from a zygote."""
    return type(kind.__name__, (kind,), {"zygote": zygote})
