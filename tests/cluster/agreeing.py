"""One of two workers, without agents: worker 1 has a clock of its own and all the requests."""

from __future__ import annotations

import sys
import time
from itertools import count
from pathlib import Path


def main(folder: str, worker: str, *ports: str) -> int:
    """Run worker `worker` on the ports of both; print what matters of what it tells."""
    skips: list[float] = []
    if worker == "1":
        real = time.monotonic
        # Before anything of the product is imported: it sees no other clock.
        time.monotonic = lambda: 1e6 + 7 * real() + sum(skips)

    from orchestrator.spec.messages import BlockDone, Ended, Message, Request, Saved, WorkerOrder
    from orchestrator.spec.schema import StrategyName
    from orchestrator.train.worker import run
    from tests.plans import tiny_plan

    plan = tiny_plan(
        Path(folder),
        strategy__name=StrategyName.multi_worker,
        strategy__num_workers=2,
        train__steps=4000,
        train__block_s=0.05,
        train__max_block_steps=20,
        checkpoint__every_s=150.0,  # by worker 1's clock this is due after its second block
        export__enabled=False,
    )
    order = WorkerOrder(
        plan=plan,
        worker=int(worker),
        attempt=1,
        addresses=tuple(f"127.0.0.1:{port}" for port in ports),
        visible_gpus="",
        restore_from=None,
    )
    calls = count(1)

    def pending() -> set[Request]:
        skips.append(100.0)
        wanted = {3: {Request.SAVE}, 6: {Request.SAVE_AND_STOP}}
        return wanted.get(next(calls), set()) if worker == "1" else set()

    def send(message: Message) -> None:
        match message:
            case BlockDone():
                told = f"block {message.first_step} {message.first_step + message.num_steps}"
            case Saved():
                told = f"saved {message.step}"
            case Ended():
                told = f"ended {message.outcome.value} {message.step}"
            case _:
                return
        print(told, flush=True)

    status = run(order, send, pending)
    # The other may still be in the last collective: leave when told that both have ended.
    sys.stdin.read()
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
