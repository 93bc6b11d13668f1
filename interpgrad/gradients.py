"""Both input gradients, from the graph of one forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from interpgrad import graph
from interpgrad.criteria import Criterion, cross_entropy, evaluate, resolve_criterion
from interpgrad.forward import Forward, check_batch, forward_without_trace
from interpgrad.guided import check_activations, guided_backward

_ATTEMPTS = 4  # at a scale for float16


def input_gradients(
    model: nn.Module,
    x: Tensor,
    y: Any = None,
    *,
    criterion: Criterion | str | None = None,
    activations: str = "relu",
    create_graph: bool = False,
) -> tuple[Tensor, Tensor]:
    """The input gradient of the classification loss, and the guided one, from one forward pass.

    The forward pass leaves no trace: buffers, `.grad`, modes, hooks and the random state are as before.

    Args:
        model: any module taking `x` first; its output is the logits (N, C), an object with `.logits`, or a
            tuple that begins with the logits. In training mode, batch norm uses the batch's statistics.
        x: images, floating point, (N, C, H, W) or any shape that begins with N.
        y: what `criterion` takes beside the logits: class indices (N,) or probabilities (N, C) for the
            built-in ones. None means the predicted class.
        criterion: None, the cross-entropy summed over the batch; "logit", the target's logit summed over the
            batch; or a callable `(logits, y) -> 0-dim tensor`.
        activations: "relu" for the piecewise-linear family, "all" for smooth rectifiers as well
            (see `interpgrad.guided`).
        create_graph: whether the first gradient can be differentiated again, in x and the parameters.

    Returns:
        `(delta, guided)`, both of the shape of x. `guided` is always detached.

    Raises:
        TypeError, ValueError: x is no floating point tensor, is empty, or does not match y in size; the
            criterion does not return a scalar; the output holds no logits; an unknown name.
        RuntimeError: under `torch.inference_mode()`; no activation of the family was met; an operation
            hides its activations or cannot be differentiated twice.

    Source: Torres et al., arXiv 2404.15024, Algorithm 1; Springenberg et al., arXiv 1412.6806.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    >>> delta, guided = input_gradients(model, torch.randn(2, 3, 2, 2), torch.tensor([0, 2]))
    >>> delta.shape, guided.shape
    (torch.Size([2, 3, 2, 2]), torch.Size([2, 3, 2, 2]))
    """
    check_batch(x, y)
    check_activations(activations)
    criterion = resolve_criterion(criterion)
    with torch.enable_grad():
        forward = forward_without_trace(model, x)
        y = forward.logits.detach().argmax(1) if y is None else y
        return gradient_pair(forward, y, criterion=criterion, activations=activations, create_graph=create_graph)


def gradient_pair(
    forward: Forward,
    y: Any,
    *,
    criterion: Criterion,
    activations: str,
    create_graph: bool,
    verified: set[frozenset[str]] | None = None,
) -> tuple[Tensor, Tensor]:
    """The input gradient and the guided one of criterion(logits, y), from the graph of one forward pass.

    `verified` remembers the sets of operations already known to have a double backward.
    """
    image = forward.image
    loss = evaluate(criterion, forward.logits, y)
    network = list(graph.nodes(forward.logits, until=image))
    float16 = torch.float16 in (image.dtype, forward.logits.dtype) or graph.casts_to(torch.float16, network)
    scale = _float16_scale(loss, criterion, forward.logits, y) if float16 else None

    operations = [*graph.nodes(loss, until=forward.logits), *network]
    graph.refuse_opaque(operations)
    if create_graph:
        graph.refuse_once_differentiable(operations)

    for _ in range(_ATTEMPTS):
        scaled = loss if scale is None else loss * scale
        with forward.inner_passes():
            with guided_backward(network, activations):
                guided = _gradient(scaled, image, create_graph=False)
            delta = _gradient(scaled, image, create_graph=create_graph)
        if scale is None or bool(delta.isfinite().all() & guided.isfinite().all()):
            break
        scale = scale / 64  # the network amplifies its gradients beyond what float16 holds

    if create_graph:
        names = frozenset(map(graph.op_name, operations))
        if verified is None or names not in verified:
            graph.refuse_failing_double_backward(delta, until=image)
        if verified is not None:
            verified.add(names)
    return (delta, guided) if scale is None else (_unscale(delta, scale), _unscale(guided, scale))


def _gradient(loss: Tensor, image: Tensor, *, create_graph: bool) -> Tensor:
    gradient = None
    if loss.requires_grad:
        # The graph is kept in any case: it is also the one of the user's own loss if the forward pass is shared.
        (gradient,) = torch.autograd.grad(loss, image, retain_graph=True, create_graph=create_graph, allow_unused=True)
    if gradient is None:
        raise RuntimeError(
            "expected a criterion that depends on the images, got one with no path back to them: look for "
            "torch.no_grad() or .detach() inside the model or the criterion."
        )
    return gradient


def _float16_scale(loss: Tensor, criterion: Criterion, logits: Tensor, y: Any) -> Tensor:
    """What to multiply the loss with: under float16 the gradients inside the network underflow.

    The largest gradient at the logits becomes about 2^8. A power of two, so nothing is rounded.
    """
    if not loss.requires_grad:
        return loss.new_ones(())
    if criterion is cross_entropy:  # at half-precision logits its gradient may have underflowed already
        logits = logits.detach().float().requires_grad_()
        loss = cross_entropy(logits, y)
    (gradient,) = torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)
    largest = torch.ones_like(loss) if gradient is None else gradient.detach().abs().max().to(loss.dtype)
    scale = torch.exp2((8 - largest.log2().ceil()).clamp(-100, 100))
    return torch.where(largest > 0, scale, 1)


def _unscale(gradient: Tensor, scale: Tensor) -> Tensor:
    return gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale
