"""Rules of what a run may ask of a cluster's nodes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from orchestrator.spec.schema import ClusterName, RunConfig, StrategyName

_LABEL = re.compile(r"[\w.\-/]+")
_LABEL_RULE = re.compile(r"!?[\w.\-]+|!?in\([\w.\-]+(, *[\w.\-]+)*\)")


def placement_rules(config: RunConfig) -> Iterator[str]:
    """Yield a line for each broken rule."""
    cluster = config.cluster
    if not (cluster.queue_s >= 0 and math.isfinite(cluster.queue_s)):
        yield f"cluster.queue_s={cluster.queue_s}: must be a number of at least 0"
    if cluster.name is not ClusterName.existing:
        for key in ("node_labels", "accelerator_type", "interface", "queue_s"):
            if value := getattr(cluster, key):
                yield (
                    f"cluster.{key}={value} with cluster={cluster.name.value}: there is nothing to "
                    "choose from; it belongs to cluster=existing"
                )
    elif config.strategy.name is StrategyName.multi_worker and not cluster.trusted_network:
        # One worker, too: TensorFlow's server is started for any TF_CONFIG.
        yield (
            f"strategy=multi_worker with cluster=existing: TensorFlow opens a port of "
            f"cluster.port_range={cluster.port_range} for each worker, which has no "
            "authentication and lets anyone who reaches it run code; if the network is closed to "
            "others, say so with cluster.trusted_network=true"
        )
    for label, rule in cluster.node_labels.items():
        if not (_LABEL.fullmatch(label) and _LABEL_RULE.fullmatch(str(rule))):
            yield (
                f"cluster.node_labels.{label}={rule}: must be a label and VALUE, !VALUE, "
                "in(VALUE,...) or !in(VALUE,...), of letters, digits, `_`, `-` and `.`"
            )
