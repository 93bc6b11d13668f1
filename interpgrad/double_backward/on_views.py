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


def by_copy(function: Callable[..., Tensor], view: Tensor, *settings: Any, **named: Any) -> Tensor:
    """What the function makes of the view, written into it."""
    return view.copy_(function(view.clone(), *settings, **named))


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """The replacement of what does the same in place."""

    def replacement(input: Tensor, *settings: Any, **named: Any) -> Any:
        return by_copy(function, input, *settings, **named) if input._is_view() else NotImplemented

    return replacement


def _by_flag(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """The replacement of a function with an argument `inplace`."""
    position = list(inspect.signature(function).parameters).index("inplace") - 1  # after the input

    def replacement(input: Tensor, *settings: Any, inplace: bool = False, **named: Any) -> Any:
        inplace = inplace or (len(settings) > position and settings[position])
        return (
            by_copy(function, input, *settings[:position], **named) if inplace and input._is_view() else NotImplemented
        )

    return replacement


_FLAGGED = (F.elu, F.celu, F.selu, F.threshold, F.rrelu, F.hardswish, F.mish)
REPLACEMENTS: dict[Any, Callable[..., Any]] = {function: _by_flag(function) for function in _FLAGGED}
REPLACEMENTS |= {F.elu_: _in_place(F.elu), F.celu_: _in_place(F.celu), F.selu_: _in_place(F.selu)}
REPLACEMENTS |= {F.threshold_: _in_place(F.threshold), F.rrelu_: _in_place(F.rrelu)}  # type: ignore[attr-defined]
for _name in ("sigmoid", "tanh", "exp", "clamp", "clamp_min", "clamp_max", "clip"):
    REPLACEMENTS |= {getattr(kind, f"{_name}_"): _in_place(getattr(torch, _name)) for kind in (torch, Tensor)}
