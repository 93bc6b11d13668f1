"""Pooling, whose double backward is pooling once more: averages, or the values where the largest ones were.

Stock adds to that a gradient for what was pooled: zeros, which then run through the backward pass of every layer
before. (Of a global average stock makes a mean, which has none.) Here what was pooled gives its shape only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interpgrad.autocast import autocast_dtype
from interpgrad.double_backward.conv import sizes
from interpgrad.double_backward.engine import Function

aten = torch.ops.aten
Settings = tuple[Any, ...]  # what both kernels take beside the tensors
_FORGET_PADDING = ("cuda",)  # where the backward kernel for channels_last is off by the padding (pytorch #188344)


class _Average(Function):
    """y = pool(x), whose backward kernel takes x for its shape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Any, unpool: Any, forward: Settings, backward: Settings) -> Tensor:
        ctx.unpool, ctx.settings = unpool, backward
        ctx.save_for_backward(x)
        y: Tensor = pool(x, *forward)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        x = x.detach()
        if x.device.type in _FORGET_PADDING and ctx.settings and any(ctx.settings[2]):
            g, x = g.contiguous(), x.contiguous()
        return ctx.unpool(g, x, *ctx.settings), None, None, None, None


class _Maximum(Function):
    """y = the largest value of each window."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pool: Any, unpool: Any, settings: Settings) -> Tensor:
        y, indices = pool(x, *settings)
        ctx.unpool, ctx.settings = unpool, settings
        ctx.save_for_backward(x, indices)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, indices = ctx.saved_tensors
        return ctx.unpool(g, x.detach(), *ctx.settings, indices), None, None, None


def _average(dims: int) -> Any:
    pool, unpool = getattr(aten, f"avg_pool{dims}d").default, getattr(aten, f"avg_pool{dims}d_backward").default

    def average(
        input: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Any:
        windows = _windows(dims, kernel_size, stride, padding)
        if not windows or _casts(input, dims):
            return NotImplemented
        settings = (*windows, ceil_mode, count_include_pad, divisor_override)
        return _Average.apply(input, pool, unpool, settings, settings)

    return average


def _adaptive(dims: int) -> Any:
    pool, unpool = (
        getattr(aten, f"_adaptive_avg_pool{dims}d").default,
        getattr(aten, f"_adaptive_avg_pool{dims}d_backward").default,
    )

    def adaptive(input: Tensor, output_size: Any) -> Any:
        if input.dim() <= dims or _casts(input, dims):
            return NotImplemented
        if type(output_size) in (tuple, list) and len(output_size) == dims:
            pairs = zip(output_size, input.shape[-dims:], strict=True)
            output_size = [own if size is None else size for size, own in pairs]
        out = sizes(output_size, dims)
        if not out or min(out) < 0 or set(out) == {1}:  # of one pixel it is the mean
            return NotImplemented
        return _Average.apply(input, pool, unpool, (out,), ())

    return adaptive


def _maximum(dims: int) -> Any:
    pool = getattr(aten, f"max_pool{dims}d_with_indices").default
    unpool = getattr(aten, f"max_pool{dims}d_with_indices_backward").default

    def maximum(
        input: Tensor,
        kernel_size: int | Sequence[int],
        stride: int | Sequence[int] | None = None,
        padding: int | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Any:
        windows = _windows(dims, kernel_size, stride, padding, dilation)
        if not windows or type(ceil_mode) is not bool or return_indices or _casts(input, dims):
            return NotImplemented
        return _Maximum.apply(input, pool, unpool, (*windows, ceil_mode))

    return maximum


def _casts(input: Tensor, dims: int) -> bool:
    """Autocast runs pooling in three dimensions in single precision, on some devices."""
    return dims == 3 and autocast_dtype(input.device) is not None


def _windows(dims: int, kernel_size: Any, stride: Any, *others: Any) -> list[Any] | None:
    """For each dimension; None where one of them is left to stock."""
    stride = kernel_size if stride is None else stride
    windows = [sizes(each, dims) for each in (kernel_size, stride, *others)]
    return None if None in windows else windows


REPLACEMENTS = {
    F.avg_pool2d: _average(2),
    F.avg_pool3d: _average(3),
    F.adaptive_avg_pool2d: _adaptive(2),
    F.adaptive_avg_pool3d: _adaptive(3),
    F.max_pool2d: _maximum(2),
    F.max_pool3d: _maximum(3),
    torch.max_pool2d: _maximum(2),
    torch.max_pool3d: _maximum(3),
}
