"""ReLU, leaky ReLU and hardtanh, whose double backward is the same mask once more.

Stock adds to that a gradient for the masked values: a tensor of zeros, which is written, added to what arrives there by
other ways, and runs through the backward pass of every layer before. Here the mask is a constant.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interpgrad.double_backward.engine import Function
from interpgrad.double_backward.on_views import by_copy

aten = torch.ops.aten


class Relu(Function):
    """y = max(x, 0), which saves its output, as the native one does."""

    operation = "Relu"

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        y: Tensor = aten.relu_(x) if inplace else aten.relu(x)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return aten.threshold_backward(g, y.detach(), 0), None


class LeakyRelu(Function):
    """y = max(x, 0) + slope min(x, 0), which saves its output in place, else its input, as the native one does."""

    operation = "LeakyRelu"

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, inplace: bool) -> Tensor:
        y: Tensor = aten.leaky_relu_(x, slope) if inplace else aten.leaky_relu(x, slope)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y if inplace else x)
        ctx.settings = slope, inplace
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (saved,) = ctx.saved_tensors
        return aten.leaky_relu_backward(g, saved.detach(), *ctx.settings), None, None


class Hardtanh(Function):
    """y = clamp(x, low, high), which saves its input, in place a copy of it, as the native one does."""

    operation = "Hardtanh"

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float, inplace: bool) -> Tensor:
        ctx.save_for_backward(x.clone() if inplace else x)
        if inplace:
            ctx.mark_dirty(x)
        y: Tensor = aten.hardtanh_(x, low, high) if inplace else aten.hardtanh(x, low, high)
        ctx.limits = low, high
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        (saved,) = ctx.saved_tensors
        return aten.hardtanh_backward(g, saved.detach(), *ctx.limits), None, None, None


def _apply(function: Any, input: Tensor, *settings: float, inplace: bool) -> Any:
    if inplace and input._is_view():
        return by_copy(function.apply, input, *settings, False)
    return function.apply(input, *settings, inplace)


def _relu(input: Tensor, inplace: bool = False) -> Any:
    return _apply(Relu, input, inplace=inplace)


def _relu_(input: Tensor) -> Any:
    return _relu(input, inplace=True)


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    if inplace and negative_slope < 0:  # an error in the backward pass
        return NotImplemented
    return _apply(LeakyRelu, input, negative_slope, inplace=inplace)


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    return _apply(Hardtanh, input, min_val, max_val, inplace=inplace)


def _relu6(input: Tensor, inplace: bool = False) -> Any:
    return _hardtanh(input, 0.0, 6.0, inplace)


REPLACEMENTS = {
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: _relu_,
    Tensor.relu_: _relu_,
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: functools.partial(_leaky_relu, inplace=True),
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.hardtanh_: functools.partial(_hardtanh, inplace=True),
}
