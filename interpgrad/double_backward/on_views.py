"""Activations in place on a view, such as `F.elu_(h[:, :8])`, by a copy.

Stock puts the activation's node inside of another, CopySlices, and leaves it reachable by itself. In the double
backward both run, in an order that depends on the threads that made them. The second of them, if the activation saves
its result, finds it freed by the first: on a GPU, where backward passes have threads of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def by_copy(function: Callable[..., Tensor], view: Tensor, *settings: Any) -> Tensor:
    """What the function makes of the view, written into it."""
    return view.copy_(function(view.clone(), *settings))


def _in_place(function: Callable[..., Tensor]) -> Callable[..., Any]:
    """The replacement of what does the same in place."""

    def replacement(input: Tensor, *settings: Any, **named: Any) -> Any:
        return by_copy(lambda copy: function(copy, *settings, **named), input) if input._is_view() else NotImplemented

    return replacement


def _elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Any:
    return _in_place(F.elu)(input, alpha) if inplace else NotImplemented


def _celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Any:
    return _in_place(F.celu)(input, alpha) if inplace else NotImplemented


def _selu(input: Tensor, inplace: bool = False) -> Any:
    return _in_place(F.selu)(input) if inplace else NotImplemented


REPLACEMENTS: dict[Any, Callable[..., Any]] = {F.elu: _elu, F.celu: _celu, F.selu: _selu}
REPLACEMENTS |= {F.elu_: _in_place(F.elu), F.celu_: _in_place(F.celu), F.selu_: _in_place(F.selu)}
for _name in ("sigmoid", "tanh", "exp"):
    REPLACEMENTS |= {getattr(kind, f"{_name}_"): _in_place(getattr(torch, _name)) for kind in (torch, Tensor)}
