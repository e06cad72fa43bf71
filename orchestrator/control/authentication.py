"""Whether a Ray cluster asks who comes, and whether its token is kept from others."""

from __future__ import annotations

import os
import stat
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from orchestrator.errors import ClusterError, ConfigError

_TIMEOUT_S = 5.0
_TOKEN_FILE = Path(".ray") / "auth_token"
# Answers that mean: not without a token.
_REFUSALS = (401, 403)


def refuse_open_token(environment: Mapping[str, str]) -> None:
    """Refuse a file with the cluster's token that others can read.

    Raises:
        ConfigError: they can.
    """
    path = token_file(environment)
    if path is None or not os.path.isfile(path):
        return
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        raise ConfigError(
            f"others can read the cluster's token: {path} has mode {mode:04o}; whoever has it runs "
            f"code on every node: chmod 600 {path}"
        )


def token_file(environment: Mapping[str, str]) -> Path | None:
    """Return the file that Ray takes a cluster's token from; None if it takes it from none."""
    if environment.get("RAY_AUTH_TOKEN"):
        return None
    if path := environment.get("RAY_AUTH_TOKEN_PATH"):
        return Path(path)
    home = environment.get("HOME")
    usual = Path(home) / _TOKEN_FILE if home else None
    # Also where it lies in a HOME of somebody else.
    return usual if usual is not None and os.path.isfile(usual) else None


def proxy_for(address: str) -> str | None:
    """Return the proxy that the environment names for an http address; None if it is for others."""
    url = urllib.parse.urlsplit(address)
    proxy = urllib.request.getproxies().get(url.scheme)
    return proxy if proxy and not urllib.request.proxy_bypass(url.netloc) else None


def refuse_open_cluster(address: str) -> None:
    """Refuse a job server that lists jobs to anybody.

    Args:
        address: of Ray's dashboard, http or https.

    Raises:
        ClusterError: it does, or nothing answers there.
    """
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/jobs/", timeout=_TIMEOUT_S):
            pass
    except urllib.error.HTTPError as error:
        if error.code in _REFUSALS:
            return
        raise ClusterError(
            f"{address} answers {error.code} to a question for its jobs; is it Ray's dashboard?"
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ClusterError(
            f"no Ray job server at cluster.address={address}: {reason}; start Ray there with "
            "`ray start --head`, or name another address"
        ) from error
    raise open_to_anybody(f"the cluster at {address}")


def open_to_anybody(where: str) -> ClusterError:
    """Return what a Ray that asks for no token is refused with."""
    return ClusterError(
        f"{where} asks nobody for a token: whoever reaches it runs code there. Start Ray with "
        "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH on every node (docs/security.md), or say "
        "cluster.allow_unauthenticated=true"
    )
