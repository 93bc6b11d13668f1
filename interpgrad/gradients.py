"""Both input gradients, from the graph of one forward pass."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from interpgrad import frozen, graph
from interpgrad.autocast import at_least_single
from interpgrad.criteria import Criterion, Derivative, derivative_of
from interpgrad.double_backward import sync_batch_norm
from interpgrad.forward import Forward, check_batch, forward_without_trace
from interpgrad.guided import check_activations, guided_backward
from interpgrad.model import alone_with, class_logits
from interpgrad.signals import uninterrupted

BATCH_NORM = ("frozen", "coupled")

_ATTEMPTS = 4  # at a scale for float16


@uninterrupted
def input_gradients(
    model: nn.Module,
    x: Tensor,
    y: Any = None,
    *,
    criterion: Criterion | str = "log_prob",
    batch_norm: str = "frozen",
    activations: str = "all",
    create_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """The input gradient of a function of the logits, and the guided one, from one forward pass.

    The forward pass leaves no trace: buffers, `.grad`, modes, hooks and the random state are as before.

    Args:
        model: any module taking `x` first; its output is the logits (N, C), an object with `.logits`, or a
            tuple that begins with the logits. In training mode, batch norm uses the batch's statistics.
        x: images, floating point, (N, C, H, W) or any shape that begins with N.
        y: what `criterion` takes beside the logits: class indices (N,) or probabilities (N, C) for the
            built-in ones. None means the predicted class.
        criterion: "log_prob", the target's log-probability; "logit", the target's logit; "cross_entropy"; or a
            callable `(logits, y) -> 0-dim tensor`; all summed over the batch. Differentiated again, the derivative of
            the first two at the logits is a constant (see `interpgrad.criteria`).
        batch_norm: "frozen", the statistics of the batch are constants in the gradients, as inference holds them;
            "coupled", they are functions of the batch, as plain autograd has them. The same in evaluation mode.
        activations: "all", every rectifier; "relu", the piecewise-linear family alone (see `interpgrad.guided`).
        create_graph: whether the first gradient can be differentiated again, in x and the parameters.

    Returns:
        `(delta, guided)`, both of the shape of x. `guided` is always detached.

    Raises:
        TypeError, ValueError: x is no floating point tensor, is empty, or does not match y in size; the
            criterion does not return a scalar; the output holds no logits; an unknown name.
        RuntimeError: under `torch.inference_mode()`; no activation of the family was met, or others beside "relu";
            an operation hides its activations or cannot be differentiated twice.

    Source: Torres et al., arXiv 2404.15024, Algorithm 1 (its reading: "cross_entropy", "coupled"); Springenberg et al.,
    arXiv 1412.6806.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> delta, guided = input_gradients(model, torch.randn(2, 3, 2, 2), torch.tensor([0, 2]))
    >>> delta.shape, guided.shape
    (torch.Size([2, 3, 2, 2]), torch.Size([2, 3, 2, 2]))
    """
    check_batch(x, y)
    check_activations(activations)
    check_batch_norm(batch_norm)
    derivative = derivative_of(criterion)
    with alone_with(model), torch.enable_grad():
        forward = forward_without_trace(model, x, batch_norm=batch_norm)
        y = class_logits(forward.logits.detach()).argmax(1) if y is None else y
        return gradient_pair(
            forward, y, derivative=derivative, batch_norm=batch_norm, activations=activations, create_graph=create_graph
        )


def check_batch_norm(batch_norm: str) -> None:
    """Refuse an unknown name."""
    if batch_norm not in BATCH_NORM:
        raise ValueError(f'expected batch_norm="frozen" or batch_norm="coupled", got {batch_norm!r}.')


def gradient_pair(
    forward: Forward,
    y: Any,
    *,
    derivative: Derivative,
    batch_norm: str,
    activations: str | None,
    create_graph: bool,
    verified: set[frozenset[str]] | None = None,
) -> tuple[Tensor, Tensor]:
    """J^T v, with v the derivative at the logits, and its guided twin, from the graph of one forward pass.

    Without `activations` the second is the first. `verified` remembers the sets of operations already known to have a
    double backward.
    """
    image, logits = forward.image, forward.logits
    if not logits.requires_grad:
        raise graph.no_path_to_images()
    v = derivative(logits, y, create_graph)
    operations = graph.operations(logits, until=image)
    if create_graph or activations:
        graph.refuse_opaque(operations)
    if create_graph:
        graph.refuse_once_differentiable(operations)
    if create_graph or batch_norm == "frozen":
        graph.refuse_sync_batch_norm(operations)

    network = frozen.Network(operations, functools.partial(forward.inner_passes, create_graph=create_graph))
    passes = _InnerPasses(forward, network, batch_norm, activations, create_graph)
    float16 = torch.float16 in (image.dtype, logits.dtype) or graph.casts_to(torch.float16, operations)
    names = frozenset((*operations, *graph.operations(v, until=logits)))
    delta, guided = (passes.in_float16 if float16 else passes.run)(v, verified is None or names not in verified)
    if create_graph and verified is not None:
        verified.add(names)
    return delta, guided


class _InnerPasses(NamedTuple):
    """The two backward passes over the graph of a forward pass that yield delta and the guided gradient."""

    forward: Forward
    network: frozen.Network
    batch_norm: str
    activations: str | None
    create_graph: bool

    def run(self, v: Tensor, verify: bool) -> tuple[Tensor, Tensor]:
        """Both gradients; with `verify`, an error if delta cannot be differentiated."""
        logits, network = self.forward.logits, self.network
        if self.batch_norm == "coupled":
            with network.inner():
                return self._two_passes(logits, v, verify)
        norms = frozen.batch_statistics(network.operations) if self.create_graph else set()
        # Where v is a function of the logits, that derivative runs through the user's graph, which is coupled.
        leaf = v.detach().requires_grad_() if norms and v.requires_grad else v
        with network.inner(), network.frozen_pass(logits) as output:
            delta, guided = self._two_passes(output, leaf, verify)
        return self._apart(delta, v, leaf, norms), guided

    def in_float16(self, v: Tensor, verify: bool) -> tuple[Tensor, Tensor]:
        """As `run`, on v times a scale, by which the results are divided: gradients inside the network underflow.

        The largest gradient at the logits becomes about 2^8. A power of two, so nothing is rounded.
        """
        v = at_least_single(v)
        agreed = functools.partial(sync_batch_norm.smallest, self.network.operations)  # its sums are of all ranks
        exponent = agreed((8 - v.detach().abs().max().log2().ceil()).clamp(-100, 100))
        for _ in range(_ATTEMPTS):
            delta, guided = self.run(v * exponent.exp2(), verify)
            finite = delta.isfinite().all() & guided.isfinite().all()
            if bool(agreed(finite.float())):
                break
            exponent = exponent - 6  # the network amplifies its gradients beyond what float16 holds
        scale = exponent.exp2().to(delta.device)
        return at_least_single(delta) / scale, at_least_single(guided) / scale

    def _two_passes(self, logits: Tensor, v: Tensor, verify: bool) -> tuple[Tensor, Tensor]:
        """J^T v, and guided. The graph is kept in any case: it is also the one of the user's own loss."""
        image, v, guided = self.forward.image, v.to(logits.dtype), None
        if self.activations:
            with guided_backward(self.network.operations, self.activations):
                (guided,) = torch.autograd.grad(logits, image, v.detach(), retain_graph=True, allow_unused=True)
                if guided is None:
                    raise graph.no_path_to_images()
        (delta,) = torch.autograd.grad(
            logits, image, v, retain_graph=True, create_graph=self.create_graph, allow_unused=True
        )
        if delta is None:
            raise graph.no_path_to_images()
        if self.create_graph and verify:
            graph.refuse_failing_double_backward(delta, until=image)
        return delta, delta if guided is None else guided

    def _apart(self, delta: Tensor, v: Tensor, leaf: Tensor, norms: set[Node]) -> Tensor:
        """Delta, differentiated in a pass of its own if its derivative reaches batch norm in the forward pass."""
        image = self.forward.image
        if not norms or (leaf is v and norms.isdisjoint(graph.nodes(delta, until=image))):
            return delta
        inputs = [each for each in graph.leaves(delta, until=image) if each is not image and each is not leaf]
        inputs += [image] if self.forward.x.requires_grad else []
        return frozen.apart(self.network, delta, [leaf, *inputs], [v, *inputs])
