"""The command that goes on with a run, from what is on record of it."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestrator.spec.paths import RunPaths

TOP_FOLDER = "runs"


def resume_command(paths: RunPaths, address: str | None, facts: Mapping[str, Any]) -> str:
    """Return what goes on with a run.

    Args:
        paths: of the run.
        address: of the job server it was submitted to.
        facts: of its newest start; its command line names the folders of the user's own code.
    """
    job, run, runs_dir = paths.root.parent.name, paths.root.name, paths.root.parent.parent
    words = shlex.split(facts.get("tags", {}).get("orchestrator.command", ""))
    named = [folder for word, folder in itertools.pairwise(words) if word == "--config-dir"]
    own = "".join(f"--config-dir={shlex.quote(folder)} " for folder in named)
    if address is not None:
        return (
            f'make submit conf={job} address={address} args="{own}runs_dir={runs_dir} '
            f'tracking.uri=... resume={run}"'
        )
    folder = "" if runs_dir == Path.cwd() / TOP_FOLDER else f"runs_dir={runs_dir} "
    return f'make train conf={job} args="{own}{folder}resume={run}"'
