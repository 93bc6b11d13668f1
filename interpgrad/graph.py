"""The recorded autograd graph: its nodes, their names, and what in it cannot serve here."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import Node

from interpgrad import private
from interpgrad.cleanup import removed_hooks
from interpgrad.double_backward.engine import Function

_TENSOR_PARALLEL = (
    "the double backward of tensor-parallel layers (DTensor) is lost between ranks; split the batch instead, "
    "with DDP or FSDP2"
)
# What hides the activations behind one node, or the derivatives, and the way out.
_OPAQUE = {
    "CompiledFunction": "a torch.compile graph has no double backward and hides its activations; call the "
    "loss without shared_forward(), on the module that was compiled (or compile after the training step)",
    "ApplyTemplate": "a function under torch.compile hides its activations; call the loss without shared_forward(), "
    "which runs it eagerly (or compile after the training step)",
    "DifferentiableGraph": "a TorchScript graph hides its activations; use the nn.Module it was scripted from",
    "CheckpointFunction": "reentrant activation checkpointing does not support torch.autograd.grad; "
    "use torch.utils.checkpoint.checkpoint(..., use_reentrant=False)",
    "_ToTorchTensor": _TENSOR_PARALLEL,
    "_FromTorchTensor": _TENSOR_PARALLEL,
    "Redistribute": _TENSOR_PARALLEL,
}
_WITHOUT_KERNEL = "WarnNotImplemented"
# Placeholders, and operators in C++, such as torchvision's, whose newest are registered in Python.
_MAY_RAISE = (
    *("torch::autograd::NotImplemented", "torch::autograd::Error"),
    *("torch::autograd::CppNode<", "GeneratedBackwardFor_torchvision_"),
)
_HIGHER_ORDER = "torch._higher_order_ops."  # cond, map, scan, while_loop, flex attention ...


_ONCE_DIFFERENTIABLE = once_differentiable(lambda *_: None).__code__

Operations = dict[str, list[Node]]


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


def operations(output: Tensor, until: Tensor) -> Operations:
    """The nodes of that graph by the operation they differentiate: it has thousands, of a dozen kinds."""
    found: Operations = {}
    for node in nodes(output, until):
        found.setdefault(op_name(node), []).append(node)
    return found


def leaves(output: Tensor, until: Tensor) -> list[Tensor]:
    """The tensors that gradients of `output` are accumulated in."""
    return [node.variable for node in nodes(output, until) if op_name(node) == "AccumulateGrad"]  # type: ignore[attr-defined]


def op_name(node: Node) -> str:
    """The operation a node differentiates: "Relu" for ReluBackward0, in every release's spelling.

    That of a Function is its class's `operation`, torch's own go by their names. A user's own Function is nothing that
    is known, whatever its name is.
    """
    function = getattr(node, "_forward_cls", None)
    if function is None or function.__module__.startswith("torch."):
        return _operation(node.name())
    return function.operation if issubclass(function, Function) else f"{function.__module__}.{function.__qualname__}"


@functools.cache  # a graph has thousands of nodes of a dozen kinds
def _operation(name: str) -> str:
    return name.rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")


def casts_to(dtype: torch.dtype, recorded: Operations) -> bool:
    """Whether anything is cast to dtype on the way: by autocast, wherever that was on, or by hand."""
    return any(private.casts_to(node, dtype) for node in recorded.get("ToCopy", ()))


def refuse_opaque(recorded: Operations) -> None:
    """Raise an OpaqueGraphError, which says what to do, if there is such a node."""
    for name in recorded.keys() & _OPAQUE.keys():
        node = recorded[name][0].name()
        raise OpaqueGraphError(f"expected a graph of single operations, got a {node} node: {_OPAQUE[name]}.")
    for each in recorded.values():
        function = getattr(each[0], "_forward_cls", None)
        if function and function.__module__.startswith(_HIGHER_ORDER):
            raise hidden_by(function.__name__.removesuffix("AutogradOp"))


def hidden_by(operator: str) -> OpaqueGraphError:
    """The error for a higher-order operator."""
    return OpaqueGraphError(
        f"expected a graph of single operations, got the higher-order operator {operator}, which hides the activations "
        "inside: write it as loops and branches in Python, attention by F.scaled_dot_product_attention."
    )


def refuse_sync_batch_norm(recorded: Operations) -> None:
    """Raise a RuntimeError if there is batch norm across ranks that is not this package's."""
    names = {name.rpartition(".")[2] for name in recorded if not name.startswith("interpgrad.")}
    if "SyncBatchNorm" in names:
        raise RuntimeError(
            "expected operations with a double backward, got a SyncBatchNorm across ranks that has none: use "
            "torch.nn.SyncBatchNorm, BatchNorm (per-rank statistics), or a norm without batch statistics such as "
            "GroupNorm."
        )


def refuse_once_differentiable(recorded: Operations) -> None:
    """Raise a RuntimeError naming the operation if the graph cannot be differentiated twice."""
    if _WITHOUT_KERNEL in recorded:
        _refuse_double_backward("a custom operator", "it is registered without an autograd kernel")
    functions: set[Any] = {getattr(node, "_forward_cls", None) for each in recorded.values() for node in each}
    for function in functions:
        # Such a Function may yield a gradient that looks constant, so the later backward would be silently
        # wrong instead of failing: it has to be found here.
        backward = getattr(function, "backward", None)
        while backward is not None:  # through all decorators
            if getattr(backward, "__code__", None) is _ONCE_DIFFERENTIABLE:
                _refuse_double_backward(function.__name__, "it is marked @once_differentiable")
            backward = getattr(backward, "__wrapped__", None)


def refuse_failing_double_backward(delta: Tensor, until: Tensor, recorded: Operations) -> None:
    """Raise a RuntimeError naming the operation if the graph of the input gradient cannot be differentiated.

    What backward passes are made of is not in the `recorded` graph of the forward pass. Nodes that may only raise say
    so when they are called: placeholders, and operators of libraries.
    """
    for name, found in operations(delta, until).items():
        if name == _WITHOUT_KERNEL:
            _refuse_double_backward("a custom operator", "its backward calls one without an autograd kernel")
        node = found[0]
        if name not in recorded and node.name().startswith(_MAY_RAISE):
            try:
                run: Any = getattr(node, "apply", node)
                run(*private.zeros_for(node))
            except (RuntimeError, TypeError) as reason:
                _refuse_double_backward(str(reason), "PyTorch has no such derivative")


def refuse_cut(output: Tensor, until: Tensor, recorded: Operations) -> None:
    """Raise a RuntimeError naming the user's Function that cuts the gradient of `output` from its graph.

    In a pass of its own, which begins with a gradient on a graph: only where there are such Functions.
    """
    if any(_is_users(found[0]) for found in recorded.values()) and output.requires_grad:
        outer = torch.ones_like(output).requires_grad_()
        with refusing_detached(recorded):
            torch.autograd.grad(output, until, outer, retain_graph=True, create_graph=True, allow_unused=True)


@contextmanager
def refusing_detached(recorded: Operations) -> Iterator[None]:
    """In a backward pass inside, a RuntimeError where a user's Function cuts a gradient from its graph.

    As one does whose backward computes in numpy, or in a kernel of its own: a derivative would be lost without a word.
    """
    with removed_hooks() as hooks:
        for found in recorded.values():
            if _is_users(found[0]):
                refuse: Any = functools.partial(_refuse_detached, found[0]._forward_cls.__name__)  # type: ignore[attr-defined]
                hooks += [node.register_hook(refuse) for node in found]
        yield


def _is_users(node: Node) -> bool:
    """Whether it is of a Function that is not this package's."""
    function = getattr(node, "_forward_cls", None)
    return function is not None and not issubclass(function, Function)


def _refuse_detached(name: str, gradients: tuple[Tensor | None, ...], outer: tuple[Tensor | None, ...]) -> None:
    attached = any(each is not None and each.requires_grad for each in outer)
    if attached and any(each is not None and not each.requires_grad and each.any() for each in gradients):
        _refuse_double_backward(name, "its backward returns a gradient without a graph")


class NoPathError(RuntimeError):
    """No gradient of the images can be taken."""


def no_path_to_images() -> NoPathError:
    """The error for an object, or logits, in which no gradient of the images can be taken."""
    return NoPathError(
        "expected a criterion that depends on the images, got one with no path back to them: look for "
        "torch.no_grad() or .detach() inside the model or the criterion."
    )


def _refuse_double_backward(operation: str, why: str) -> None:
    raise RuntimeError(
        f"expected operations with a double backward, got one without: {operation} ({why}). Replace it by "
        "differentiable torch operations, give it a differentiable backward, or select another backend for it."
    )
