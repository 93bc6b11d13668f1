"""Targets: the constants t that the input gradient delta is compared with.

| `target=` | t | backward passes beside delta's |
| --- | --- | --- |
| "guided" | the guided gradient of the same criterion | one |
| "low_pass" | delta's own 3x3 mean | none |
| "zero" | 0; with `error="mse"` the classical gradient penalty | none |
| "given" | the tensor of this call, `reg(x, y, target=t)`: a map to agree with, or a mask | none |
| a callable | `target(passes) -> tensor`, made of what `Passes` offers | those it asks for |

Source of the gradient penalty: Drucker and LeCun, "Improving generalization performance using double backpropagation",
1992; Ross and Doshi-Velez, arXiv 1711.09404.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from interpgrad.autocast import at_least_single
from interpgrad.errors import mask_for
from interpgrad.gradients import Passes
from interpgrad.transforms import low_pass

TargetName = Literal["guided", "low_pass", "zero", "given"]
Target = Callable[[Passes], Tensor]

GIVEN = "given"
BUILT_IN: dict[str, Target] = {
    "guided": lambda passes: passes.gradient(guided=True),
    "low_pass": lambda passes: low_pass(at_least_single(passes.attached_delta.detach())),
    "zero": lambda passes: passes.x.new_zeros(()).expand_as(passes.x),
}
_NO_DIRECTION = 'which has no direction: use "mse", the gradient penalty, or "mae".'
_NO_MASK = 'which is no mask: use target="given", and reg(x, y, target=mask) at each call, or a callable.'


def check_target(target: Target | str, error: Any) -> None:
    """Raise a ValueError for an unknown target, or one that the error has no use for."""
    if not callable(target) and not (isinstance(target, str) and target in (*BUILT_IN, GIVEN)):
        raise ValueError(
            f"expected target to be one of {', '.join(map(repr, (*BUILT_IN, GIVEN)))} or a callable (passes) -> "
            f"tensor, got {target!r}."
        )
    if target == "zero" and error in ("cos", "hi"):
        raise ValueError(
            f'expected an error that compares with 0, got error="{error}" for target="zero", {_NO_DIRECTION}'
        )
    if error == "outside" and isinstance(target, str) and target in BUILT_IN:
        raise ValueError(f'expected a mask of relevant pixels for error="outside", got target="{target}", {_NO_MASK}')


def check_given(target: Target | str, given: Any, x: Tensor, error: Any) -> None:
    """Raise an error unless a tensor was given where one is asked for, and no other. Its values are not looked at."""
    if target != GIVEN and given is not None:
        raise TypeError(
            f"expected no target at this call, got {type(given).__name__} for a loss with target={target!r}: make the "
            'loss with target="given".'
        )
    if target == GIVEN:
        if given is None:
            raise TypeError(
                'expected a target at this call, got none for a loss with target="given": reg(x, y, target=t).'
            )
        _check(given, x, error)


def make_target(target: Target | str, given: Any, passes: Passes, error: Any, *, first: bool) -> Tensor:
    """The target of these passes, of delta's shape, or a mask as it was given.

    Its values are looked at in the `first` call, and on the CPU in every one: looking waits for a GPU.
    """
    if isinstance(target, str) and target in BUILT_IN:
        return BUILT_IN[target](passes)
    made: Tensor = given
    if callable(target):  # what is given was checked before the forward pass
        made = target(passes)
        _check(made, passes.x, error)
    made = made.detach().to(at_least_single(passes.x[:0]).dtype)
    if first or made.device.type == "cpu":
        _refuse_values(made, error)
    if first and error == "outside":
        zero = (mask_for(passes.x, made) == 0).expand_as(passes.x).flatten(1).all(1)
        if zero.any():
            warnings.warn(
                f"mask: {int(zero.sum())} of {len(zero)} images have one of zeros, an error of 1 and no gradient. Give "
                "images without annotation a mask of ones.",
                stacklevel=2,
            )
    return made if error == "outside" else made.expand_as(passes.x)


def _check(target: Any, x: Tensor, error: Any) -> None:
    if not isinstance(target, Tensor) or not (target.is_floating_point() or target.dtype == torch.bool):
        received = f"a tensor of {target.dtype}" if isinstance(target, Tensor) else type(target).__name__
        raise TypeError(
            f"expected target to be a tensor, floating point or bool, got {received}: use torch.as_tensor(t).float()."
        )
    if target.device != x.device:
        raise ValueError(f"expected target on {x.device}, as the images, got {target.device}: use t.to(x.device).")
    if error == "outside":
        mask_for(x, target)
        return
    if target.dim() == x.dim() - 1 > 1 and len(target) == len(x) == x.shape[1] > 1:
        raise ValueError(
            f"expected target to say what its first dimension is, got {tuple(target.shape)} where N equals C: use "
            "(N, 1, H, W) for a map for each image, (1, C, H, W) for one for all."
        )
    try:
        target.expand_as(x)
    except RuntimeError:
        raise ValueError(
            f"expected target to have the shape of the images, {tuple(x.shape)}, or one that broadcasts to it, got "
            f"{tuple(target.shape)}: a map for each image is (N, 1, H, W)."
        ) from None


def _refuse_values(target: Tensor, error: Any) -> None:
    if not target.isfinite().all():
        raise ValueError("expected a finite target, got NaN or infinity: look at how it was made.")
    if error == "outside" and (target.min() < 0 or target.max() > 1):
        low, high = float(target.min()), float(target.max())
        raise ValueError(f"expected a mask in [0, 1], got values from {low:g} to {high:g}: divide it by its largest.")
