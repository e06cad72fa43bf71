"""Which code of the project a process imports, in a few letters."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from orchestrator.spec.paths import PROJECT_DIR

# What workers import; conf/ is read by the driver alone.
_IMPORTED = ("orchestrator", "jobs")


@functools.cache
def code_digest(project: Path = PROJECT_DIR) -> str:
    """Return a digest of the project's own code and its jobs, as they are imported here."""
    digest = hashlib.sha256()
    for path in sorted(path for name in _IMPORTED for path in (project / name).rglob("*.py")):
        digest.update(path.relative_to(project).as_posix().encode() + b"\0")
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
