"""Variables of the environment that would change a run behind its configuration's back."""

from __future__ import annotations

from collections.abc import Mapping

from orchestrator.spec.schema import ClusterName, RunConfig
from orchestrator.spec.secrets import mask_text

# Variable -> why it is not honoured, and what to use instead.
_OVERRULED = {
    "TF_CONFIG": "the plan makes TF_CONFIG for each worker",
    "TF_USE_LEGACY_KERAS": "Keras 3 is what trains here",
    "MLFLOW_TRACKING_URI": "the record goes where tracking.uri says",
    "MLFLOW_RUN_ID": "a run is continued with resume=RUN",
    "MLFLOW_EXPERIMENT_NAME": "the experiment is tracking.experiment",
    "MLFLOW_EXPERIMENT_ID": "the experiment is tracking.experiment",
    "MLFLOW_REGISTRY_URI": "models are registered where tracking.uri says",
}
_PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def inspect_environment(
    environ: Mapping[str, str], config: RunConfig
) -> tuple[list[str], dict[str, str | None]]:
    """Find what would hijack a run.

    Args:
        environ: the environment of the driver.
        config: the run's configuration.

    Returns:
        What to tell the user, and the changes to the environment; None unsets a variable.
    """
    notices, changes = inspect_for(environ, config.cluster.name)
    is_own = "RAY_JOB_ID" in environ  # Ray tells its jobs which cluster they are on
    if environ.get("RAY_ADDRESS") and config.cluster.name is ClusterName.existing and not is_own:
        said = f"RAY_ADDRESS={mask_text(environ['RAY_ADDRESS'])} is set and"
        if config.cluster.address in (None, "auto"):
            notices.append(f"{said} honoured: cluster.address=auto is the cluster there")
        elif config.cluster.address != environ["RAY_ADDRESS"]:
            notices.append(f"{said} not honoured: cluster.address={config.cluster.address} is")
            changes["RAY_ADDRESS"] = None
    return notices, changes


def inspect_for(
    environ: Mapping[str, str], cluster: ClusterName
) -> tuple[list[str], dict[str, str | None]]:
    """Find what would hijack any run on a kind of cluster; see `inspect_environment`."""
    notices: list[str] = []
    changes: dict[str, str | None] = {}
    for name, reason in _OVERRULED.items():
        if environ.get(name):
            notices.append(f"{name} is set and not honoured: {reason}")
            changes[name] = None
    if environ.get("RAY_ADDRESS") and cluster is ClusterName.local:
        notices.append(
            f"RAY_ADDRESS={mask_text(environ['RAY_ADDRESS'])} is set and not honoured: "
            "cluster=local starts its own Ray; join that one with cluster=existing"
        )
        changes["RAY_ADDRESS"] = None
    backend = environ.get("KERAS_BACKEND") or "tensorflow"
    if backend != "tensorflow":
        notices.append(f"KERAS_BACKEND={backend} is set and not honoured: TensorFlow trains here")
        changes["KERAS_BACKEND"] = "tensorflow"
    for name in (*_honoured(environ), "CUDA_VISIBLE_DEVICES"):
        if environ.get(name):
            notices.append(f"{name}={environ[name]} is set and honoured")
    if direct := loopback_without_proxy(environ):
        notices.append("a proxy is set: loopback is taken out of it (no_proxy)")
        changes |= direct
    return notices, changes


def loopback_without_proxy(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep a proxy away from loopback; none where that is so already."""
    if not any(environ.get(name) for name in _PROXIES):
        return {}
    text = environ.get("no_proxy") or environ.get("NO_PROXY") or ""
    known = [name.strip() for name in text.split(",")]
    missing = [name for name in _LOOPBACK if name not in known]
    if "*" in known or not missing:
        return {}
    return dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join([*filter(None, [text]), *missing]))


def inspect_node(environ: Mapping[str, str]) -> list[str]:
    """Return, as `NAME=VALUE`, what changes how a node's workers compute, or reach each other.

    Args:
        environ: the environment that the node's Ray was started with.
    """
    names = [name for name in (*_honoured(environ), *_PROXIES) if environ.get(name)]
    return [f"{name}={mask_text(environ[name])}" for name in names]


def _honoured(environ: Mapping[str, str]) -> list[str]:
    """Return the names of variables that compilers and collectives read, set or not."""
    nccl = sorted(name for name in environ if name.startswith("NCCL_"))
    return ["XLA_FLAGS", "TF_XLA_FLAGS", *nccl]
