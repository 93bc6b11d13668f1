"""The scalar whose input gradients are compared: a function of the logits and the targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Criterion = Callable[[Tensor, Any], Tensor]

_IGNORED = -100  # the default ignore_index of F.cross_entropy


def cross_entropy(logits: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy summed, not averaged: a sample's gradient must not depend on the size of its batch.

    For class indices it is written as log(1 + sum_{c != y} exp(z_c - z_y)). `F.cross_entropy` has the same
    value, but p_y - 1 in its gradient cancels: in single precision the target's logit drops out of the
    gradient of every sample with p_y > 1 - 6e-8, and the direction of what is left is another one.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if y.is_floating_point() or logits.dim() != 2 or logits.shape[1] == 1:
        return F.cross_entropy(logits, y, reduction="sum")
    kept = y != _IGNORED
    target = torch.where(kept, y, 0).long()[:, None]
    finite = logits.clamp(min=torch.finfo(logits.dtype).min / 2)  # a masked class has no gradient, not NaN
    margin = finite.scatter(1, target, -torch.inf).logsumexp(1) - finite.gather(1, target).squeeze(1)
    # The same function twice: each form loses the second derivative where the other one is used.
    loss = torch.where(margin < 0, F.softplus(margin, threshold=40), -F.logsigmoid(-margin))
    return torch.where(kept, loss, 0).sum()


def target_logit(logits: Tensor, y: Tensor) -> Tensor:
    """Sum of the targets' logits, what saliency methods explain; of the expected logits for probabilities y."""
    if y.is_floating_point():
        return (logits * y).sum()
    return logits.gather(1, y[:, None]).sum()


def resolve_criterion(criterion: Criterion | str | None) -> Criterion:
    """The criterion behind a name; None is the summed cross-entropy."""
    if criterion is None:
        return cross_entropy
    if criterion == "logit":
        return target_logit
    if isinstance(criterion, str) or not callable(criterion):
        raise ValueError(
            f'expected criterion=None (cross-entropy), "logit" or a callable (logits, y) -> 0-dim, got {criterion!r}.'
        )
    return criterion


def evaluate(criterion: Criterion, logits: Tensor, y: Any) -> Tensor:
    """The value of the criterion, checked to be a 0-dim tensor."""
    loss = criterion(logits.clone(), y)  # the criterion may work in place; the logits may be the user's
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        received = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(
            f"expected the criterion to return a 0-dim tensor, got {received}: sum it over the batch "
            '(reduction="sum"), so that a sample\'s gradient does not depend on the batch size.'
        )
    return loss
