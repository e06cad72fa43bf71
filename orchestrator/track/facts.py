"""What the record of a run needs to know, kept in the first line of its journal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.spec.secrets import mask_text

# Of a run's records; a version that changes their meaning counts on.
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFacts:
    """Everything that does not change while a run is recorded.

    Attributes:
        run: name of the run; the tag that finds it in MLflow.
        root: the run folder.
        log_every_steps: a number or `auto`.
        register: name in the model registry, or None.
        alias: of the version that is registered, or None.
        params: the configuration, flattened and masked.
        tags: provenance: code, versions, command line.
    """

    run: str
    job: str
    experiment: str
    tracking_uri: str
    artifact_root: str | None
    root: str
    log_every_steps: str
    global_batch_size: int
    timeout_s: float
    register: str | None
    params: Mapping[str, str]
    tags: Mapping[str, str]
    alias: str | None = None  # journals of versions before it have none

    def record(self, time: float) -> dict[str, Any]:
        """Return the journal's record of these facts; credentials in the address stay out."""
        facts = {**dataclasses.asdict(self), "tracking_uri": mask_text(self.tracking_uri)}
        return {"kind": "RunStarted", "time": time, "format": FORMAT, "facts": facts}

    @staticmethod
    def from_record(record: Mapping[str, Any], root: Path) -> RunFacts:
        """Read the facts back; the folder may have moved since."""
        known = {item.name for item in dataclasses.fields(RunFacts)}
        values = {key: value for key, value in record["facts"].items() if key in known}
        return RunFacts(**{**values, "root": str(root)})

    def moved(self, tracking_uri: str, artifact_root: str | None) -> RunFacts:
        """Return the same facts for another MLflow."""
        return dataclasses.replace(self, tracking_uri=tracking_uri, artifact_root=artifact_root)
