"""How much memory the tensors of a graph hold at a time, told from the graph alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

# Their output is their input's memory, or a variable's that is counted elsewhere.
_VIEWS = {"Identity", "IdentityN", "Reshape", "StopGradient", "ExpandDims", "Squeeze"}
_VARIABLES = {"ReadVariableOp", "VarHandleOp"}
# What they hold inside is not seen from the graph around them.
_CLOSED = {"While", "StatelessWhile", "If", "StatelessIf", "PartitionedCall"}
_CLOSED |= {"StatefulPartitionedCall"}


def peak_bytes(graph: Any, outputs: Sequence[Any]) -> tuple[int, bool]:
    """Return the most that tensors hold at a time, if operations run in the order of the graph.

    A tensor lives from the operation that makes it to the last that reads it. Operations that run
    in parallel, and the scratch memory of kernels, come on top.

    Args:
        graph: with static shapes, as far as they are known.
        outputs: tensors that live to the end; what they do not depend on is never run.

    Returns:
        Bytes, and whether that is a lower bound because some shapes or loops cannot be seen.
    """
    needed = _needed(outputs)
    operations = [op for op in graph.get_operations() if op.name in needed]
    last_read: dict[str, int] = {}
    for place, op in enumerate(operations):
        for tensor in op.inputs:
            last_read[_origin(tensor).name] = place
    for tensor in outputs:
        last_read[_origin(tensor).name] = len(operations)
    ends: dict[int, int] = {}  # place -> bytes that are let go after it
    held = peak = 0
    is_lower_bound = False
    for place, op in enumerate(operations):
        is_lower_bound = is_lower_bound or op.type in _CLOSED
        if op.type not in _VIEWS | _VARIABLES:
            for tensor in op.outputs:
                size = _size(tensor)
                is_lower_bound = is_lower_bound or size is None
                end = last_read.get(tensor.name, place)
                held += size or 0
                ends[end] = ends.get(end, 0) + (size or 0)
        peak = max(peak, held)
        held -= ends.pop(place, 0)
    return peak, is_lower_bound


def _needed(outputs: Sequence[Any]) -> set[str]:
    """Return the names of the operations that the outputs depend on."""
    waiting, found = [tensor.op for tensor in outputs], set()
    while waiting:
        op = waiting.pop()
        if op.name not in found:
            found.add(op.name)
            waiting += [tensor.op for tensor in op.inputs]
            waiting += list(op.control_inputs)
    return found


def _origin(tensor: Any) -> Any:
    """Return the tensor whose memory it is."""
    while tensor.op.type in _VIEWS and len(tensor.op.inputs) > tensor.value_index:
        tensor = tensor.op.inputs[tensor.value_index]
    return tensor


def _size(tensor: Any) -> int | None:
    """Return the bytes of a tensor; None if its shape or type is not known."""
    if tensor.dtype == tf.resource:
        return 0  # a handle
    if tensor.dtype.size and tensor.shape.is_fully_defined():
        return int(math.prod(tensor.shape.as_list())) * int(tensor.dtype.size)
    # Lists of axes and the like, which gradients are full of.
    is_short = tensor.dtype.is_integer and tensor.shape.rank in (0, 1)
    return 0 if is_short else None
