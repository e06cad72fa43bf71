"""The worker's end of its pipes: requests come from the agent and by signal."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Signals that come every tenth of a millisecond find the loop in every line of `pending`.
SCRIPT = """
import os, signal
from orchestrator.spec.messages import Request
from orchestrator.train.link import Link

(_, message_fd), (control_fd, agents_end) = os.pipe(), os.pipe()
link, came, seen = Link(message_fd, control_fd), 0, False

def ask(*_):
    global came
    came += 1
    link.ask(Request.SAVE_AND_STOP)

signal.signal(signal.SIGALRM, ask)
signal.setitimer(signal.ITIMER_REAL, 0.0001, 0.0001)
while came < 5000:
    seen |= link.pending() == {Request.SAVE_AND_STOP}
signal.setitimer(signal.ITIMER_REAL, 0)
link.pending()
print(seen, link.pending(), flush=True)
os._exit(0)
"""


def test_a_signal_that_comes_while_requests_are_looked_at_is_noted_and_stops_nothing() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.stdout, done.stderr) == ("True set()\n", "")
