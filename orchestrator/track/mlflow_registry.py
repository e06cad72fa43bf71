"""Logs a proven model in MLflow with its lineage and figures, and registers it on request.

As everything that is sent to MLflow: doing it twice leaves the same behind.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from orchestrator.spec.paths import RunPaths
from orchestrator.track.mlflow_store import DIGEST_LENGTH, RUN_TAG, Store, legal, shortened
from orchestrator.track.origin import Origin

EXPORT_TAG = "orchestrator.export"
_ALIAS_TAG = "orchestrator.alias"
_VERSIONS_TAG = "mlflow.modelVersions"
_MAX_PARAM = 500
# What the proof has measured, and the metrics it is known by.
_FIGURES = {
    "size_bytes": "model/size_bytes",
    "max_difference": "model/max_difference",
    "latency_1_ms": "model/latency_1_ms",
    "latency_64_ms": "model/latency_64_ms",
}


def log_model(store: Store, paths: RunPaths, origin: Origin) -> str:
    """Log and register the packaged model, once for each packaging; return its address."""
    from mlflow.entities import LoggedModelOutput

    client, facts = store.client, store.facts
    # MLmodel holds a unique id: the same file means the same packaging.
    export = hashlib.sha256((paths.mlflow_model_dir / "MLmodel").read_bytes()).hexdigest()
    model = _logged(store, export)
    if model is None:
        lineage = {key: shortened(text, _MAX_PARAM) for key, text in origin.params().items()}
        model = client.create_logged_model(
            store.experiment_id,
            name=re.sub(r"[/:.%\"']", "_", facts.job),
            source_run_id=store.run_id,
            tags={RUN_TAG: facts.run, EXPORT_TAG: export},
            params=lineage,
            model_type="savedmodel",
        )
        client.log_model_artifacts(model.model_id, str(paths.mlflow_model_dir))
        client.finalize_logged_model(model.model_id, "READY")
    outputs = client.get_run(store.run_id).outputs
    if model.model_id not in [item.model_id for item in outputs.model_outputs]:
        client.log_outputs(store.run_id, [LoggedModelOutput(model.model_id, origin.step)])
    metrics = _metrics(model.model_id, _proof(paths), origin)
    told = [metric for metric in metrics if not _is_told(store, metric)]
    client.log_batch(store.run_id, metrics=told)
    # A start that was asked to register and has not got as far as its export registers nothing:
    # an alias would move to the model of before.
    if facts.register is not None and origin.is_new:
        _register(store, facts.register, facts.alias, model)
    return str(model.model_uri)


def _logged(store: Store, export: str) -> Any:
    """Return the model of a packaging if it was logged whole; remove halves of it."""
    whole = None
    filters = f"source_run_id = '{store.run_id}' AND tags.`{EXPORT_TAG}` = '{export}'"
    for model in store.client.search_logged_models([store.experiment_id], filters):
        if str(model.status).upper().endswith("READY"):
            whole = model
        else:
            store.client.delete_logged_model(model.model_id)
    return whole


def _proof(paths: RunPaths) -> Mapping[str, Any]:
    proof: dict[str, Any] = json.loads(paths.proof.read_text())
    return proof


def _metrics(model_id: str, proof: Mapping[str, Any], origin: Origin) -> list[Any]:
    """Return what is known of the model: figures of the proof, and the evaluation of its step."""
    from mlflow.entities import Metric

    proven_ms = round(proof.get("time", 0.0) * 1000)
    metrics = [
        Metric(key, proof[name], proven_ms, origin.step, model_id=model_id)
        for name, key in _FIGURES.items()
        if name in proof
    ]
    evaluated, data = origin.told.get(origin.step), origin.data.get("eval")
    if evaluated is None or data is None:
        return metrics
    # The run has these points too: with the same time and value they are the same ones.
    return metrics + [
        Metric(
            legal(f"eval/{name}"),
            value,
            round(evaluated["time"] * 1000),
            origin.step,
            model_id=model_id,
            dataset_name=data["name"],
            dataset_digest=data["digest"][:DIGEST_LENGTH],
        )
        for name, value in evaluated["metrics"].items()
    ]


def _is_told(store: Store, metric: Any) -> bool:
    """Tell whether the run has a figure of this step from an earlier export of it."""
    if metric.key not in _FIGURES.values():
        return False
    history = store.client.get_metric_history(store.run_id, metric.key)
    return any(p.step == metric.step and p.timestamp != metric.timestamp for p in history)


def _register(store: Store, name: str, alias: str | None, model: Any) -> None:
    """Make the model a version of the registered one, and give it the alias."""
    client, uri = store.client, f"models:/{model.model_id}"
    if not client.search_registered_models(filter_string=f"name = '{name}'"):
        client.create_registered_model(name)
    versions = client.search_model_versions(f"name = '{name}'")
    version = next(
        (v for v in versions if uri in (v.source, f"models:/{v.model_id}")), None
    ) or client.create_model_version(name, source=uri, run_id=store.run_id, model_id=model.model_id)
    _link(client, model.model_id, name, str(version.version))
    # Given once: by now somebody may have moved the alias on to another version.
    if alias is not None and version.tags.get(_ALIAS_TAG) != alias:
        client.set_registered_model_alias(name, alias, version.version)
        client.set_model_version_tag(name, version.version, _ALIAS_TAG, alias)


def _link(client: Any, model_id: str, name: str, version: str) -> None:
    """Let the model's page lead to the version, as a server does by itself (MLflow 3.17)."""
    known = json.loads(client.get_logged_model(model_id).tags.get(_VERSIONS_TAG, "[]"))
    if (name, version) not in [(item["name"], str(item["version"])) for item in known]:
        linked = [*known, {"name": name, "version": version}]
        client.set_logged_model_tags(model_id, {_VERSIONS_TAG: json.dumps(linked)})
