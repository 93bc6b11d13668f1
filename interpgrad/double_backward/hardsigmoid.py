"""Hardsigmoid, of which PyTorch has no double backward: MobileNetV3's gates could not be trained."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interpgrad.double_backward.engine import Function, apply_each
from interpgrad.double_backward.on_views import by_copy

aten = torch.ops.aten


class Hardsigmoid(Function):
    """y = clamp(x / 6 + 1 / 2, 0, 1)."""

    operation = "Hardsigmoid"

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        ctx.save_for_backward(x.clone() if inplace else x)
        if inplace:
            ctx.mark_dirty(x)
        y: Tensor = aten.hardsigmoid_(x) if inplace else aten.hardsigmoid(x)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return apply_each(_HardsigmoidBackward, g, x.detach()), None


class _HardsigmoidBackward(Function):
    """dx = g / 6 where |x| < 3, else 0: piecewise linear, so that differentiating it again repeats it."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        dx: Tensor = aten.hardsigmoid_backward(g, x)
        return dx

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None]:
        return apply_each(_HardsigmoidBackward, u, *ctx.saved_tensors), None


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Any:
    """The replacement of F.hardsigmoid, with its signature."""
    return by_copy(F.hardsigmoid, input) if inplace and input._is_view() else Hardsigmoid.apply(input, inplace)


REPLACEMENTS = {F.hardsigmoid: _hardsigmoid}
