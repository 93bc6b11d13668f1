"""Guided backpropagation, switched on for one backward pass over an ordinary autograd graph.

Source: Springenberg et al., "Striving for Simplicity: The All Convolutional Net", arXiv 1412.6806. At every
activation the gradient arriving from above is clamped to >= 0 before it is multiplied by the activation's
own derivative.

Why on the graph, and not on modules or functions: however an activation was called (module, function,
method, in place, made inside forward, inside an ATen composite, under checkpointing, on another thread), it
leaves one node, and the gradient that reaches this node is the gradient from above, summed over all its
consumers. The forward pass runs PyTorch's own kernels, and without the hooks nothing is left of guided
backpropagation: neither the standard nor the double backward can see it.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node
from torch.utils._python_dispatch import TorchDispatchMode

from interpgrad.graph import Operations

# Operation of an autograd node -> the ATen function that is its backward.
PIECEWISE_LINEAR = {
    "Relu": "threshold_backward",
    "Threshold": "threshold_backward",
    "Hardtanh": "hardtanh_backward",  # also ReLU6
    "LeakyRelu": "leaky_relu_backward",
    "PreluKernel": "_prelu_kernel_backward",
    "RreluWithNoise": "rrelu_with_noise_backward",
    "ClampMin": "where",  # where the minimum is 0, see _is_activation
    "Clamp": "where",
    "Maximum": "where",  # where the other operand is a constant 0
}
SMOOTH = {
    "Gelu": "gelu_backward",
    "Silu": "silu_backward",
    "Hardswish": "hardswish_backward",
    "Elu": "elu_backward",  # also SELU
    "Celu": "elu_backward",
    "Mish": "mish_backward",
    "Softplus": "softplus_backward",
}
FAMILIES = {"relu": PIECEWISE_LINEAR, "all": PIECEWISE_LINEAR | SMOOTH}

# Squashing functions serve as gates (squeeze-and-excitation) more often than as activations: never clamped,
# but named when nothing else was met.
_OTHERS = ("Sigmoid", "Tanh", "Hardsigmoid", "LogSigmoid", "Softshrink", "Hardshrink", "Glu")


def guided_nodes(graph: Operations, activations: str) -> dict[str, list[Node]]:
    """The nodes at which a backward pass is guided, by operation; but for those inside CopySlices nodes."""
    nodes = {
        name: [node for node in graph.get(name, ()) if _is_activation(name, node)] for name in FAMILIES[activations]
    }
    return {name: each for name, each in nodes.items() if each}


def unguided(graph: Operations, activations: str) -> dict[str, int]:
    """How many activations and gates of each kind are not guided: of the other family, squashing, clamps not at 0."""
    guided = guided_nodes(graph, activations)
    left = {name: len(graph.get(name, ())) - len(guided.get(name, ())) for name in (*FAMILIES["all"], *_OTHERS)}
    return {name: count for name, count in left.items() if count}


@contextmanager
def guided_backward(graph: Operations, activations: str) -> Iterator[Counter[str]]:
    """While active, a backward pass over `graph` is guided at the activations of the chosen family.

    Yields the count, by kernel, of those that it meets inside CopySlices nodes, which no one knows beforehand.

    Raises RuntimeError on leaving if the graph has no such activation: the pass was an ordinary one. And on entering
    if it has, beside those of the family "relu", others, which would not be guided.
    """
    family = FAMILIES[activations]
    guided = [node for nodes in guided_nodes(graph, activations).values() for node in nodes]
    left = sorted(graph.keys() & SMOOTH.keys()) if activations == "relu" else []
    if left and guided:
        raise RuntimeError(
            f'expected activations of the family activations="relu" alone, got {", ".join(left)} beside them, which '
            'would be left unguided: pass activations="all".'
        )
    clamp = _Clamp()
    with ExitStack() as hooks:
        for node in guided:
            hooks.callback(node.register_prehook(clamp).remove)
        inplace = graph.get("CopySlices")
        on_views = hooks.enter_context(_ClampInsideCopySlices(inplace, family)) if inplace else None
        yield on_views.met if on_views else Counter()
    if not clamp.met and not (on_views and on_views.met):
        raise RuntimeError(_no_activation(graph, activations))


def _is_activation(name: str, node: Node) -> bool:
    """Whether a node of a family's name is one: clamps are, at 0."""
    if name in ("ClampMin", "Clamp"):
        return _is_zero(getattr(node, "_saved_min", None))
    if name == "Maximum":
        (of_self, _), (of_other, _) = node.next_functions
        saved: Any = node
        return (of_other is None and _is_zero(saved._saved_other)) or (of_self is None and _is_zero(saved._saved_self))
    return True


def _is_zero(value: float | Tensor | None) -> bool:
    return value is not None and not torch.as_tensor(value).any()


class _Clamp:
    """The hook: clamps the gradient from above. Counts the activations that the backward pass did reach."""

    def __init__(self) -> None:
        self.met = 0

    def __call__(self, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        self.met += 1
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


class _Thread(threading.local):
    """What one of the engine's threads, of which every device has its own, is doing."""

    def __init__(self) -> None:
        self.inside = False  # a CopySlices node
        self.masks: list[Tensor] = []


class _ClampInsideCopySlices(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The one hiding place of the graph: an activation in place on a view, such as `h[:, :8].relu_()`.

    Its node sits inside a CopySlices node, where hooks do not reach. So while a CopySlices node runs, the
    first argument (the gradient from above) of the family's ATen backward functions is clamped.
    """

    def __init__(self, copy_slices: list[Node], family: dict[str, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kernels = set(family.values())
        self.met: Counter[str] = Counter()
        self._thread = _Thread()
        self._handles = []
        for node in copy_slices:
            self._handles += [node.register_prehook(self._enter_node), node.register_hook(self._exit_node)]

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def _enter_node(self, _: Any) -> None:
        self._thread.inside = True

    def _exit_node(self, *_: Any) -> None:
        self._thread.inside = False
        self._thread.masks.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if self._thread.inside and self._is_backward(name, args):
            self.met[name] += 1
            gradient = 1 if name == "where" else 0
            args = (*args[:gradient], args[gradient].clamp(min=0), *args[gradient + 1 :])
        result = func(*args, **(kwargs or {}))
        if self._thread.inside and self._makes_mask(name, args):
            self._thread.masks.append(result)
        return result

    def _is_backward(self, name: str, args: Any) -> bool:
        return name in self.kernels and (name != "where" or self._is_mask(args[0]))

    def _makes_mask(self, name: str, args: Any) -> bool:
        """clamp(min=0) differentiates into where(x > 0, gradient, 0); `>=` in older releases, `&` with a maximum."""
        if name == "logical_and":
            return self._is_mask(args[0])
        return name in ("gt", "ge") and not isinstance(args[1], Tensor) and args[1] == 0

    def _is_mask(self, tensor: Tensor) -> bool:
        return any(tensor is mask for mask in self._thread.masks)
