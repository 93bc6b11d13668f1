"""Guided backpropagation, switched on for one backward pass over an ordinary autograd graph.

Source: Springenberg et al., "Striving for Simplicity: The All Convolutional Net", arXiv 1412.6806. At every
activation the gradient arriving from above is clamped to >= 0 before it is multiplied by the activation's
own derivative.

Why on the graph, and not on modules or functions: every activation leaves one node, however it was called. It may be a
module, a function or a method, in place, made inside forward, inside an ATen composite, under checkpointing, on another
thread. The gradient that reaches its node is the gradient from above, summed over all its consumers. The forward pass
runs PyTorch's own kernels. Without the hooks nothing is left of guided backpropagation: neither the standard nor the
double backward can see it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from interpgrad.cleanup import removed_hooks
from interpgrad.graph import Operations, op_name

# Operations of autograd nodes. Hardtanh is also ReLU6, Elu also SELU; clamps and maxima count at 0 (`_is_activation`).
PIECEWISE_LINEAR = (
    *("Relu", "Threshold", "Hardtanh", "LeakyRelu", "PreluKernel", "RreluWithNoise", "ClampMin", "Clamp", "Maximum"),
)
SMOOTH = ("Gelu", "Silu", "Hardswish", "Elu", "Celu", "Mish", "Softplus")
_BY_HAND = "x * sigmoid(a x)"  # SiLU, quick-GELU: the node of the product
FAMILIES = {"relu": PIECEWISE_LINEAR, "all": (*PIECEWISE_LINEAR, *SMOOTH, _BY_HAND)}

# Squashing functions serve as gates (squeeze-and-excitation) more often than as activations: never clamped,
# but named when nothing else was met.
_OTHERS = ("Sigmoid", "Tanh", "Hardsigmoid", "LogSigmoid", "Softshrink", "Hardshrink", "Glu")


def guided_nodes(graph: Operations, activations: str) -> dict[str, list[Node]]:
    """The nodes at which a backward pass is guided, by operation."""
    nodes = {
        name: [node for node in graph.get("Mul" if name == _BY_HAND else name, ()) if _is_activation(name, node)]
        for name in FAMILIES[activations]
    }
    return {name: each for name, each in nodes.items() if each}


def unguided(graph: Operations, activations: str) -> dict[str, int]:
    """How many activations and gates of each kind are not guided: of the other family, squashing, clamps not at 0."""
    guided = guided_nodes(graph, activations)
    met = guided | {"Sigmoid": guided.get(_BY_HAND, [])}
    left = {name: len(graph.get(name, ())) - len(met.get(name, ())) for name in (*PIECEWISE_LINEAR, *SMOOTH, *_OTHERS)}
    return {name: count for name, count in left.items() if count > 0}  # one gate may be of two products


@contextmanager
def guided_backward(graph: Operations, activations: str) -> Iterator[None]:
    """While active, a backward pass over `graph` is guided at the activations of the chosen family.

    Raises RuntimeError on leaving if the pass has met no such activation: it was an ordinary one. And on entering if
    there are, beside those of the family "relu", others, which would not be guided.
    """
    guided = [node for nodes in guided_nodes(graph, activations).values() for node in nodes]
    left = sorted(guided_nodes(graph, "all").keys() - {*PIECEWISE_LINEAR}) if activations == "relu" else []
    if left and guided:
        raise RuntimeError(
            f'expected activations of the family activations="relu" alone, got {", ".join(left)} beside them, which '
            'would be left unguided: pass activations="all".'
        )
    clamp = _Clamp()
    with removed_hooks() as hooks:
        for node in guided:
            hooks.append(node.register_prehook(clamp))
        yield
    if not clamp.met:
        raise RuntimeError(_no_activation(graph, activations))


def _is_activation(name: str, node: Node) -> bool:
    """Whether a node of a family's name is one: clamps are, at 0, and products by a gate of their own."""
    if name == _BY_HAND:
        first, *others = node.next_functions  # of a product with a number there is one
        return any(_is_gate_of(each, first) or _is_gate_of(first, each) for each in others)
    if name in ("ClampMin", "Clamp"):
        return _is_zero(getattr(node, "_saved_min", None))
    if name == "Maximum":
        (of_self, _), (of_other, _) = node.next_functions
        saved: Any = node
        return (of_other is None and _is_zero(saved._saved_other)) or (of_self is None and _is_zero(saved._saved_self))
    return True


def _is_gate_of(gate: Any, x: Any) -> bool:
    """Whether the gate is sigmoid(x), or sigmoid(a x) with a constant or a parameter a: edges of the graph, both."""
    if x[0] is None or gate[0] is None or op_name(gate[0]) != "Sigmoid":
        return False
    (inner,) = gate[0].next_functions
    if inner == x:
        return True
    factors = list(inner[0].next_functions) if inner[0] is not None and op_name(inner[0]) == "Mul" else []
    others = [node for node, _ in factors if node is not x[0]]
    return x in factors and all(node is None or op_name(node) == "AccumulateGrad" for node in others)


def _is_zero(value: float | Tensor | None) -> bool:
    return value is not None and not torch.as_tensor(value).any()


class _Clamp:
    """The hook: clamps the gradient from above. `met` says whether the backward pass did reach an activation."""

    def __init__(self) -> None:
        self.met = False

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        self.met = True
        if any(
            gradient is not None and gradient.is_nested and gradient.layout == torch.strided for gradient in gradients
        ):
            raise RuntimeError(
                "expected activations of ordinary or jagged tensors, got nested ones with layout=torch.strided, whose "
                "gradients PyTorch's hooks do not take: make them with layout=torch.jagged."
            )
        return tuple(None if gradient is None else gradient.clamp(min=0) for gradient in gradients)


def _no_activation(graph: Operations, activations: str) -> str:
    seen = [f"{name} x{len(graph[name])}" for name in (*FAMILIES["all"], *_OTHERS) if name in graph]
    remedy = (
        'Pass activations="all" for a model of smooth activations.'
        if activations == "relu" and any(name in graph for name in SMOOTH)
        else f'activations="all" covers {", ".join(SMOOTH)} and the ReLU family; replace what is none of these.'
    )
    return (
        f'expected at least one activation of the family activations="{activations}" in the forward pass, got '
        f"{', '.join(seen) or 'none of any kind'}: the guided gradient would equal the input gradient. {remedy}"
    )
