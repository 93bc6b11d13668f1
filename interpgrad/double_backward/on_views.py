"""Activations in place on a view, such as `F.elu_(h[:, :8])`, by a copy.

NOTE. Stock hides the activation's node inside of another, CopySlices. There no hook reaches it, so it could not be
guided. In the double backward both nodes run, in an order that depends on the threads that made them. The second finds
what it saved freed by the first: on a GPU, where backward passes have threads of their own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _left_to_stock(*_: Any, **__: Any) -> Any:
    return NotImplemented


def in_place(stock: Callable[..., Tensor], replacement: Callable[..., Any] = _left_to_stock) -> Callable[..., Any]:
    """The replacement of a stock function that is in place, by its name or where it is told to be.

    Given what replaces it on tensors that are no views.
    """
    always = stock.__name__.endswith("_")
    position = 0 if always else list(inspect.signature(stock).parameters).index("inplace") - 1  # after the input

    def replaced(input: Tensor, *settings: Any, **named: Any) -> Any:
        if always or named.get("inplace") or (len(settings) > position and settings[position]):
            if input.is_leaf and input.requires_grad:  # an error, which stock raises before it writes
                return NotImplemented
            if input._is_view():
                copy = input.clone()
                y = replacement(copy, *settings, **named)
                return input.copy_(stock(copy, *settings, **named) if y is NotImplemented else y)
        return replacement(input, *settings, **named)

    return replaced


_FLAGGED = (F.elu, F.celu, F.selu, F.threshold, F.rrelu, F.hardswish, F.mish)
_ALWAYS = (F.elu_, F.celu_, F.selu_, F.threshold_, F.rrelu_)  # type: ignore[attr-defined]
REPLACEMENTS: dict[Any, Callable[..., Any]] = {function: in_place(function) for function in (*_FLAGGED, *_ALWAYS)}
for _name in ("sigmoid", "tanh", "exp", "clamp", "clamp_min", "clamp_max", "clip"):
    REPLACEMENTS |= {each: in_place(each) for each in (getattr(torch, f"{_name}_"), getattr(Tensor, f"{_name}_"))}
