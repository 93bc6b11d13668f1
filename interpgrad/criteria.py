"""The criterion C whose input gradients are compared, by its derivative v at the logits z: delta = J^T v.

Constant v: "log_prob", v = e_y - p, and "logit", v = e_y, where p is the softmax of z and e_y the target's indicator,
or its probabilities. A penalty on delta then shapes how evidence flows to the logits, and not how sure the network is.

Differentiated v: "cross_entropy", v = p - e_y, as in Algorithm 1 of Torres et al., arXiv 2404.15024, and callables.

Guided backpropagation is not odd. The guided gradient of the log-probability follows the evidence for the target. The
one of the cross-entropy, its negative, follows the evidence for the other classes.

Shapes: logits and v (N, C), y (N,) class indices or (N, C) probabilities; further dimensions follow C. One logit z for
each image, (N, 1) or (N,), counts as two, -z/2 and z/2, and y is then 0 or 1, or the probability of 1.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interpgrad import graph
from interpgrad.autocast import at_least_single
from interpgrad.model import class_logits

CriterionName = Literal["log_prob", "logit", "cross_entropy"]
Criterion = Callable[[Tensor, Any], Tensor]  # (logits, y) -> 0-dim
Derivative = Callable[[Tensor, Any, bool], Tensor]  # (logits, y, create_graph) -> v

IGNORED = -100  # the default ignore_index of F.cross_entropy
_MEANS = ("mean", "batchmean")


def derivative_of(criterion: Criterion | str, ignore_index: int) -> Derivative:
    """The derivative at the logits of the criterion with this name, or of a callable summed over the batch."""
    if isinstance(criterion, str) and criterion in _DERIVATIVES:
        return functools.partial(_of_classes, _DERIVATIVES[criterion], ignore_index)
    if isinstance(criterion, (str, type)) or not callable(criterion):
        raise ValueError(
            f"expected criterion to be one of {', '.join(map(repr, _DERIVATIVES))} or a callable (logits, y) -> 0-dim, "
            f"got {criterion!r}."
        )
    if ignore_index != IGNORED:
        raise ValueError(
            f"expected ignore_index for a criterion by name, got {ignore_index} for {criterion!r}: give it to that one."
        )
    return functools.partial(_differentiated, _summed(criterion))


def _of_classes(derivative: Derivative, ignore_index: int, logits: Tensor, y: Any, create_graph: bool) -> Tensor:
    """The derivative at the logits, also where there is one for each image and y is binary, or its probability."""
    classes, y = class_logits(logits), _targets(logits, y, ignore_index)
    try:
        if classes is logits:
            return derivative(logits, y, create_graph)
        y = y.reshape(classes[:, 0].shape) if y.numel() == logits.numel() else y
        if y.is_floating_point():
            y = torch.where((y == IGNORED)[:, None], 0, torch.stack([1 - y, y], 1))
        of_both = derivative(classes, y, create_graph)
        return ((of_both[:, 1] - of_both[:, 0]) / 2).view(logits.shape)
    except (IndexError, RuntimeError):
        if logits.device.type == "cpu":  # with CUDA all is lost by then
            refuse_out_of_range(logits, y, ignore_index)
        raise


def refuse_out_of_range(logits: Tensor, y: Any, ignore_index: int) -> None:
    """Raise a ValueError if there are no logits for some class indices. On a GPU this waits for the device."""
    classes, y = class_logits(logits).shape[1], _targets(logits, y, ignore_index)
    if y.is_floating_point() or not y.numel():
        return
    low, high = (int(end) for end in torch.where(y.long() == IGNORED, 0, y.long()).aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"expected class indices from 0 to {classes - 1}, or {ignore_index} for images to ignore, got {low} to "
            f"{high}: compare the number of classes of the model with that of the dataset."
        )


def kept_images(logits: Tensor, y: Any, ignore_index: int) -> Tensor:
    """Whether each image has a target that is not to be ignored, (N,)."""
    y = _targets(logits, y, ignore_index)
    kept: Tensor = y != IGNORED
    return kept.reshape(len(y), -1).any(1)


def _log_prob(logits: Tensor, y: Tensor, create_graph: bool) -> Tensor:  # noqa: ARG001
    """e_y - p, or y - p sum(y), as sums over the other classes: 1 - p_y cancels where the network is sure.

    In single precision it is 0 for every p_y > 1 - 6e-8, and the target's logit drops out of the gradient.
    """
    p, y = at_least_single(logits.detach()).softmax(1), _distribution(logits, y)
    return y * _sum_of_others(p) - p * _sum_of_others(y)


def _logit(logits: Tensor, y: Tensor, create_graph: bool) -> Tensor:  # noqa: ARG001
    return _distribution(logits, y)


def _targets(logits: Tensor, target: Any, ignore_index: int) -> Tensor:
    """Class indices or probabilities, of y as a tensor, list or array: (N,) also if (N, 1), or (N, C) if one-hot.

    Those to ignore are then IGNORED.
    """
    if target is None or isinstance(target, (int, float, str)):
        raise TypeError(f"expected y to hold a target for each image, got {type(target).__name__}: pass a tensor (N,).")
    y: Tensor = torch.as_tensor(target, device=logits.device)
    one_logit = logits.dim() < 2 or logits.shape[1] == 1
    if y.shape == logits.shape and not (one_logit or y.is_floating_point()):
        return y.to(torch.promote_types(logits.dtype, torch.float32))
    if ignore_index != IGNORED and (one_logit or not y.is_floating_point()):
        y = torch.where(y == ignore_index, IGNORED, y if y.is_floating_point() else y.long())
    if one_logit or y.is_floating_point():
        return y
    return y.squeeze(1) if y.shape == (len(logits), 1, *logits.shape[2:]) else y


def _distribution(logits: Tensor, y: Tensor) -> Tensor:
    """(N, C): y, or ones at the targets, but for those to ignore."""
    zeros = torch.zeros_like(at_least_single(logits.detach()))
    if y.shape != (logits.shape if y.is_floating_point() else (*logits.shape[:1], *logits.shape[2:])):
        raise ValueError(
            f"expected y to hold class indices, or probabilities of the shape of the logits, {tuple(logits.shape)}, "
            f"got {y.dtype} of shape {tuple(y.shape)}."
        )
    if y.is_floating_point():
        return zeros + y.detach()
    y = y.long().unsqueeze(1)
    return zeros.scatter(1, torch.where(y == IGNORED, 0, y), (y != IGNORED).to(zeros.dtype))


def _sum_of_others(share: Tensor) -> Tensor:
    """For each class the sum over the others, of numbers that are not negative."""
    largest = share.argmax(1, keepdim=True)
    total_of_others = share.scatter(1, largest, 0).sum(1, keepdim=True)
    return (share.sum(1, keepdim=True) - share).scatter(1, largest, total_of_others)


def _differentiated(criterion: Criterion, logits: Tensor, y: Any, create_graph: bool) -> Tensor:
    """The derivative of criterion(logits, y), by autograd."""
    if class_logits(logits) is not logits and (
        getattr(criterion, "func", None) is F.cross_entropy or isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss))
    ):
        raise ValueError(
            f"expected a criterion for one logit, got cross-entropy, which is constant there, with logits of shape "
            f'{tuple(logits.shape)}: use nn.BCEWithLogitsLoss(reduction="sum"), or the name "cross_entropy".'
        )
    value = criterion(logits.clone(), y)  # it may work in place; the logits may be the user's
    if not isinstance(value, Tensor) or value.dim() != 0:
        received = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(
            f"expected the criterion to return a 0-dim tensor, got {received}: sum it over the batch "
            '(reduction="sum"), so that a sample\'s gradient does not depend on the batch size.'
        )
    operations = graph.operations(value, until=logits)
    graph.refuse_opaque(operations)
    if create_graph:
        graph.refuse_once_differentiable(operations)
        graph.refuse_cut(value, logits, operations)
    v = None
    if value.requires_grad:
        (v,) = torch.autograd.grad(value, logits, retain_graph=True, create_graph=create_graph, allow_unused=True)
    if v is None:
        raise graph.no_path_to_images()
    return v


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy summed, not averaged: a sample's gradient must not depend on the size of its batch.

    For class indices it is written as log(1 + sum_{c != y} exp(z_c - z_y)). `F.cross_entropy` has the same
    value, but p_y - 1 in its gradient cancels. In single precision the target's logit then drops out of the
    gradient of every sample with p_y > 1 - 6e-8. What is left has another direction.
    """
    logits = at_least_single(logits)
    if y.is_floating_point() or logits.dim() != 2 or logits.shape[1] == 1:
        return F.cross_entropy(logits, y, reduction="sum")
    y = y.long()
    kept = y != IGNORED
    target = torch.where(kept, y, 0)[:, None]
    finite = logits.clamp(min=torch.finfo(logits.dtype).min / 2)  # a masked class has no gradient, not NaN
    margin = finite.scatter(1, target, -torch.inf).logsumexp(1) - finite.gather(1, target).squeeze(1)
    # The same function twice: each form loses the second derivative where the other one is used.
    loss = torch.where(margin < 0, F.softplus(margin, threshold=40), -F.logsigmoid(-margin))
    return torch.where(kept, loss, 0).sum()


def _cross_entropy(logits: Tensor, y: Tensor, create_graph: bool) -> Tensor:
    # In half-precision logits its gradient may have underflowed already.
    return _differentiated(cross_entropy, at_least_single(logits), y, create_graph)


def _summed(criterion: Criterion) -> Criterion:
    """The criterion with reduction="sum" in the place of "mean", where it says how that is done.

    torch's losses do, and functions with a parameter of this name.
    """
    if isinstance(criterion, nn.Module):
        reduction = getattr(criterion, "reduction", None)
        if isinstance(criterion, nn.modules.loss._Loss) and reduction in _MEANS:
            criterion = copy.copy(criterion)
            criterion.reduction = "sum"
        elif reduction in _MEANS:
            raise ValueError(
                f"expected a criterion summed over the batch, got {type(criterion).__name__} with "
                f'reduction="{reduction}", whose value depends on the batch size: make it with reduction="sum".'
            )
        return criterion
    try:
        reduction = inspect.signature(criterion).parameters["reduction"].default
    except (TypeError, ValueError, KeyError):  # without a signature, or such a parameter
        return criterion
    return functools.partial(criterion, reduction="sum") if reduction in _MEANS else criterion  # type: ignore[call-arg]


_DERIVATIVES: dict[str, Derivative] = {
    "log_prob": _log_prob,
    "logit": _logit,
    "cross_entropy": _cross_entropy,
}
