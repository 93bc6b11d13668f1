"""ReLU and hardtanh, whose double backward is the same mask once more.

Stock adds to that a gradient for the masked values: a tensor of zeros, which is written, and added to what arrives
there by other ways. That is three passes over memory for nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

aten = torch.ops.aten


class _ReLU(Function):
    """y = max(x, 0), which saves its output, as the native one does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        y: Tensor = aten.relu_(x) if inplace else aten.relu(x)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _Masked.apply(g, *ctx.saved_tensors, aten.threshold_backward, (0,)), None


class _Hardtanh(Function):
    """y = clamp(x, low, high), which saves its output in place, else its input, as the native one does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float, inplace: bool) -> Tensor:
        y: Tensor = aten.hardtanh_(x, low, high) if inplace else aten.hardtanh(x, low, high)
        if inplace:
            ctx.mark_dirty(x)
        ctx.save_for_backward(y if inplace else x)
        ctx.limits = low, high
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        return _Masked.apply(g, *ctx.saved_tensors, aten.hardtanh_backward, ctx.limits), None, None, None


class _Masked(Function):
    """dx = backward(g, saved, *limits): g where the rectifier is linear, else 0. Differentiated, it repeats itself."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, saved: Tensor, backward: Callable[..., Tensor], limits: tuple[float, ...]
    ) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.settings = backward, limits
        return backward(g, saved, *limits)

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, None, None, None]:
        return _Masked.apply(u, *ctx.saved_tensors, *ctx.settings), None, None, None


def _relu(input: Tensor, inplace: bool = False) -> Any:
    return NotImplemented if inplace and input._is_view() else _ReLU.apply(input, inplace)


def _relu_(input: Tensor) -> Any:
    return _relu(input, inplace=True)


def _hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Any:
    return NotImplemented if inplace and input._is_view() else _Hardtanh.apply(input, min_val, max_val, inplace)


def _relu6(input: Tensor, inplace: bool = False) -> Any:
    return _hardtanh(input, 0.0, 6.0, inplace)


REPLACEMENTS = {
    F.relu: _relu,
    torch.relu: _relu,
    Tensor.relu: _relu,
    torch.relu_: _relu_,
    Tensor.relu_: _relu_,
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
}
