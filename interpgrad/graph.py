"""The recorded autograd graph: its nodes, their names, and what in it cannot serve here."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

# What hides the activations behind one node, and the way out.
_OPAQUE = {
    "CompiledFunction": "a torch.compile graph has no double backward and hides its activations; call the "
    "loss without shared_forward(), on the module that was compiled (or compile after the training step)",
    "DifferentiableGraph": "a TorchScript graph hides its activations; use the nn.Module it was scripted from",
    "CondAutogradOp": "torch.cond hides the activations of its branches; branch in Python instead",
    "CheckpointFunction": "reentrant activation checkpointing does not support torch.autograd.grad; "
    "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
}


_ONCE_DIFFERENTIABLE = once_differentiable(lambda *_: None).__code__


class OpaqueGraphError(RuntimeError):
    """The graph has a node behind which activations cannot be seen."""


def nodes(output: Tensor, until: Tensor) -> Iterator[Node]:
    """Every node of the graph behind `output`, each once, not going past `until`."""
    seen: set[Node | None] = {None, until.grad_fn}
    pending = [output.grad_fn]
    while pending:
        node = pending.pop()
        if node in seen or node is None:
            continue
        seen.add(node)
        yield node
        pending.extend(parent for parent, _ in node.next_functions)


def op_name(node: Node) -> str:
    """The operation a node differentiates: "Relu" for ReluBackward0, in every release's spelling."""
    return _operation(node.name())


@functools.cache  # a graph has thousands of nodes of a dozen kinds
def _operation(name: str) -> str:
    return name.rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")


def casts_to(dtype: torch.dtype, recorded: list[Node]) -> bool:
    """Whether anything is cast to dtype on the way: by autocast, wherever that was on, or by hand."""
    return any(
        gradient.dtype == dtype for node in recorded if op_name(node) == "ToCopy" for gradient in node._input_metadata
    )


def refuse_opaque(recorded: list[Node]) -> None:
    """Raise an OpaqueGraphError, which says what to do, if there is such a node."""
    for node in recorded:
        if remedy := _OPAQUE.get(op_name(node)):
            raise OpaqueGraphError(f"expected a graph of single operations, got a {node.name()} node: {remedy}.")


def refuse_once_differentiable(recorded: list[Node]) -> None:
    """Raise a RuntimeError naming the operation if the graph cannot be differentiated twice."""
    for node in recorded:
        if op_name(node) == "SyncBatchNorm":
            raise RuntimeError(
                "expected operations with a double backward, got a SyncBatchNorm across ranks that has none: "
                "use torch.nn.SyncBatchNorm outside of checkpointed layers, BatchNorm (per-rank statistics), or a norm "
                "without batch statistics such as GroupNorm."
            )
        # Such a Function may yield a gradient that looks constant, so the later backward would be silently
        # wrong instead of failing: it has to be found here.
        function: Any = getattr(node, "_forward_cls", None)
        backward = getattr(function, "backward", None)
        while backward is not None:  # through all decorators
            if getattr(backward, "__code__", None) is _ONCE_DIFFERENTIABLE:
                _refuse_double_backward(function.__name__, "it is marked @once_differentiable")
            backward = getattr(backward, "__wrapped__", None)
        if op_name(node) == "WarnNotImplemented":
            _refuse_double_backward("a custom operator", "it is registered without an autograd kernel")


def refuse_failing_double_backward(delta: Tensor, until: Tensor) -> None:
    """Raise a RuntimeError naming the operation if the graph of the input gradient has a node that only raises."""
    for node in nodes(delta, until):
        if node.name().endswith(("::NotImplemented", "::Error")):
            try:  # the node is a placeholder; called, it says which derivative is missing
                node(*[torch.zeros(()) for _ in getattr(node, "_input_metadata", ())])  # type: ignore[operator]
            except (RuntimeError, TypeError) as reason:
                _refuse_double_backward(str(reason), "PyTorch has no such derivative")


def _refuse_double_backward(operation: str, why: str) -> None:
    raise RuntimeError(
        f"expected operations with a double backward, got one without: {operation} ({why}). Replace it by "
        "differentiable torch operations, give it a differentiable backward, or select another backend for it."
    )
