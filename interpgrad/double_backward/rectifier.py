"""ReLU, leaky ReLU and hardtanh, whose double backward is the same mask once more.

Stock adds to that a gradient for the masked values: a tensor of zeros, which is written, added to what arrives there by
other ways, and runs through the backward pass of every layer before. Here the mask is a constant.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interpgrad.double_backward.engine import Function
from interpgrad.double_backward.on_views import in_place

aten = torch.ops.aten


class Relu(Function):
    """y = max(x, 0), which saves its output, as the native one does."""

    operation = "Relu"

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        y: Tensor = aten.relu_.default(x) if inplace else aten.relu.default(x)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (y,) = ctx.saved_tensors
        return aten.threshold_backward.default(g, y.detach(), 0), None


class LeakyRelu(Function):
    """y = max(x, 0) + slope min(x, 0), which saves its output in place, else its input, as the native one does."""

    operation = "LeakyRelu"

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: float, inplace: bool) -> Tensor:
        y: Tensor = aten.leaky_relu_.default(x, slope) if inplace else aten.leaky_relu.default(x, slope)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y if inplace else x)
        ctx.settings = slope, inplace
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (saved,) = ctx.saved_tensors
        return aten.leaky_relu_backward.default(g, saved.detach(), *ctx.settings), None, None


class Hardtanh(Function):
    """y = clamp(x, low, high), which saves its input, in place a copy of it, as the native one does."""

    operation = "Hardtanh"

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float, inplace: bool) -> Tensor:
        ctx.save_for_backward(x.clone() if inplace else x)
        if inplace:
            ctx.mark_dirty(x)
        y: Tensor = aten.hardtanh_.default(x, low, high) if inplace else aten.hardtanh.default(x, low, high)
        ctx.limits = low, high
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        (saved,) = ctx.saved_tensors
        return aten.hardtanh_backward.default(g, saved.detach(), *ctx.limits), None, None, None


_NUMBERS = (int, float)  # others are left to stock, to convert or to refuse


def _relu(input: Tensor, inplace: bool = False) -> Any:
    return Relu.apply(input, inplace)


def _relu_of_torch(input: Tensor) -> Any:
    return Relu.apply(input, False)


def _relu_(input: Tensor) -> Any:
    return Relu.apply(input, True)


def _relu6(input: Tensor, inplace: bool = False) -> Any:
    return Hardtanh.apply(input, 0.0, 6.0, inplace)


def _leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    if type(negative_slope) not in _NUMBERS or (inplace and not negative_slope >= 0):  # an error in the backward pass
        return NotImplemented
    return LeakyRelu.apply(input, negative_slope, inplace)


def _leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Any:
    return _leaky_relu(input, negative_slope, True)


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    if type(min_val) not in _NUMBERS or type(max_val) not in _NUMBERS or not min_val <= max_val:
        return NotImplemented
    return Hardtanh.apply(input, min_val, max_val, inplace)


def _hardtanh_(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    return _hardtanh(input, min_val, max_val, True)


_IN_PLACE: dict[Any, Any] = {F.relu: _relu, F.relu6: _relu6, F.leaky_relu: _leaky_relu, F.hardtanh: _hardtanh}
_IN_PLACE |= {torch.relu_: _relu_, Tensor.relu_: _relu_, F.leaky_relu_: _leaky_relu_, F.hardtanh_: _hardtanh_}
REPLACEMENTS = {torch.relu: _relu_of_torch, Tensor.relu: _relu_of_torch}
REPLACEMENTS |= {stock: in_place(stock, replacement) for stock, replacement in _IN_PLACE.items()}
