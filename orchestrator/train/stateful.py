"""Random operations whose state a checkpoint does not have, found in a traced graph."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

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


# Kernels that change a tf.Variable or a table.
_ASSIGNING = re.compile(
    r"Assign(Add|Sub)?VariableOp|ResourceScatter\w+|Resource(Sparse)?Apply\w+"
    r"|LookupTable(Insert|Remove)V2"
)

_CALLING = re.compile(r"\w*(PartitionedCall|If|While|Case)")


@contextmanager
def assignments_refused() -> Iterator[None]:
    """Refuse what a block of code builds to change a `tf.Variable`, which no checkpoint has.

    Keras's variables are another matter: `Captured` takes what is assigned to them. Operations that
    are run at once, without a graph, are not seen.

    Raises:
        JobError: there is such an operation.
    """
    if tf.executing_eagerly():
        yield
        return
    graph = tf.compat.v1.get_default_graph()
    num_before = len(graph.get_operations())
    yield
    built = graph.get_operations()[num_before:]
    found = {(op.type, op.name) for op in built if _ASSIGNING.fullmatch(op.type)}
    calls = (op.node_def for op in built if _CALLING.fullmatch(op.type))
    inner = _called(graph, calls, set())
    found |= {(node.op, node.name) for node in inner if _ASSIGNING.fullmatch(node.op)}
    if found:
        told = ", ".join(f"{kind} ({name})" for kind, name in sorted(found))
        raise JobError(
            f"the job changes a tf.Variable while it computes a batch: {told}. No checkpoint has "
            "it, evaluation would change it too, and each replica has another. Make what depends "
            "on the step a schedule or a weight of the model, and return what is counted as a "
            "metric"
        )


def _called(graph: Any, nodes: Iterable[Any], seen: set[str]) -> Iterator[Any]:
    """Yield the operations in the functions that some operations call."""
    for name in [value.func.name for node in nodes for value in node.attr.values()]:
        # TensorFlow 2.21 has no public way from a function's name to its operations.
        function = graph._functions.get(name)
        if function is not None and name not in seen:
            seen.add(name)
            inner = function.cached_definition.node_def
            yield from inner
            yield from _called(graph, inner, seen)


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
