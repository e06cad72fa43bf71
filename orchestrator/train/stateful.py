"""Random operations whose state a checkpoint does not have, found in a traced graph."""

from __future__ import annotations

import re
from typing import Any

from orchestrator.errors import JobError

# Kernels that hold a state of their own, which begins anew with the process, and those of
# tf.random.Generator, whose variable nobody saves (TensorFlow 2.21, ops/random_ops.cc,
# stateful_random_ops.cc, candidate_sampling_ops.cc, image_ops.cc).
_STATEFUL = re.compile(
    r"RandomUniform(Int)?|RandomStandardNormal|(Parameterized)?TruncatedNormal|RandomShuffle"
    r"|Multinomial|RandomGamma|RandomPoisson(V2)?|RandomCrop|SampleDistortedBoundingBox(V2)?"
    r"|(\w+)CandidateSampler|Stateful(StandardNormal(V2)?|TruncatedNormal|Uniform\w*|RandomBinomial)"
    r"|RngSkip|RngReadAndSkip|(V2)?NonDeterministicInts"
)


def refuse_stateful_draws(graph: Any) -> None:
    """Refuse operations that draw other numbers after a restart.

    Args:
        graph: GraphDef of a block, with the functions it calls.

    Raises:
        JobError: there is one.
    """
    nodes = [*graph.node, *(node for f in graph.library.function for node in f.node_def)]
    found = {node.op: node.name for node in nodes if _STATEFUL.fullmatch(node.op)}
    if found:
        told = ", ".join(f"{op} ({name})" for op, name in sorted(found.items()))
        raise JobError(
            f"train.deterministic=true: the step has {told}, which draws other numbers after a "
            "restart; draw from the seeds that prepare() gets (orchestrator.train.draws, "
            "tf.random.stateless_*) or with keras.random and keras.layers, or set "
            "train.deterministic=false"
        )
