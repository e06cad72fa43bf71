"""Whether two configurations compute the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

# What says how one start of a run is made, or where it is kept; not what is computed.
_NOT_COMPUTED = ("run_name", "resume", "resume_allow", "runs_dir", "tracking.", "export.", "chaos.")


def fingerprint(params: Mapping[str, str]) -> str:
    """Return a digest of the settings that decide what a run computes.

    Args:
        params: the flattened configuration.
    """
    kept = {key: value for key, value in params.items() if not key.startswith(_NOT_COMPUTED)}
    text = json.dumps(kept, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
