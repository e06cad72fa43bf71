"""What commands under test are not to take over from the command that runs the tests."""

from __future__ import annotations

import os

# `make test` hands its own flags and variables down to every make beneath it.
_MAKES_OWN = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKEOVERRIDES")
_VARIABLES = ("PYTHON", "args", "conf", "device")


def without_make() -> dict[str, str]:
    """Return the environment without what `make test` was given."""
    return {k: v for k, v in os.environ.items() if k not in (*_MAKES_OWN, *_VARIABLES)}
