"""A process that checks a run folder as `train` does before it starts anything."""

from __future__ import annotations

import sys
from pathlib import Path

from orchestrator.control.preflight import run_checks
from orchestrator.errors import OrchestratorError
from tests.plans import tiny_plan

if __name__ == "__main__":
    plan = tiny_plan(Path(sys.argv[1]))
    plan.paths.root.mkdir(parents=True)
    try:
        run_checks(plan)
    except OrchestratorError as error:
        print(error)
        sys.exit(error.exit_code)
