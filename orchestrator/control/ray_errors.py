"""What Ray says when it loses an actor, in words for whoever runs the job."""

from __future__ import annotations

import re

from ray.exceptions import OutOfMemoryError, RayError

from orchestrator.errors import first_line

# Of Ray 2.60: "Memory on the node (IP: …, ID: …) was 14.9GB used / 15.6GB limit (0.95)".
_USAGE = re.compile(r"was (\S+) used / (\S+) limit")


def why_lost(error: RayError) -> str:
    """Return in one line why Ray lost an actor; a lack of memory is told with its figures."""
    # It is no RayActorError: whoever catches only these takes it for a bug.
    if not isinstance(error, OutOfMemoryError):
        return first_line(error)
    found = _USAGE.search(str(error))
    held = f": {found[1]} of {found[2]} are in use" if found else ""
    return (
        f"Ray's memory monitor ended it because the memory of its node ran out{held}; give the "
        "node more memory or fewer workers, keep less data in memory, or raise Ray's limit "
        "(RAY_memory_usage_threshold where Ray is started)"
    )
