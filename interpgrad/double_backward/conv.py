"""Convolution whose double backward runs on native kernels.

Stock PyTorch differentiates the data gradient g -> convT(g, W) with a convolution over transposed tensors, group
by group in C++. Here the data gradient is a Function of its own, bilinear in g and W: for an incoming u the gradient
for g is conv(u, W), and the one for W is the native weight gradient of conv(u, W) at g.

Shapes: x (N, C, *spatial), weight (K, C / groups, *kernel), g and y (N, K, *spatial'); transposed convolutions
have (C, K / groups, *kernel). geometry: stride, padding, dilation, transposed, output_padding, groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interpgrad.autocast import autocast_dtype, without_autocast
from interpgrad.double_backward.engine import Function, apply_each, needed, tensors_of

aten = torch.ops.aten
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], bool, Sequence[int], int]


class _Convolution(Function):
    """y = conv(x, weight) + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.geometry = geometry
        ctx.tensors = tensors_of(x, weight, bias)
        ctx.save_for_backward(x, weight)
        y: Tensor = aten.convolution.default(x, weight, bias, *geometry)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, *for_parameters = needed(ctx, ctx.tensors)
        if not torch.is_grad_enabled():
            return *_convolution_backward(g, x, weight, ctx.geometry, [for_x, *for_parameters]), None
        dx = apply_each(_DataGradient, g, weight, x.detach(), ctx.geometry) if for_x else None
        dweight = dbias = None
        if any(for_parameters):
            _, dweight, dbias = _convolution_backward(g, x, weight, ctx.geometry, [False, *for_parameters])
        return dx, dweight, dbias, None


class _DataGradient(Function):
    """dx = convT(g, weight): the data gradient, where it is to be differentiated again. x gives the shape only."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
        ctx.geometry = geometry
        ctx.save_for_backward(g, weight)
        dx = _convolution_backward(g, x, weight, geometry, [True, False, False])[0]
        assert dx is not None
        return dx

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        # Both expressions are differentiable by stock PyTorch: derivatives of any order are right.
        g, weight = ctx.saved_tensors
        for_g, for_weight = needed(ctx, (True, True))
        dg = dweight = None
        if for_g:
            with without_autocast(u.device):
                dg = aten.convolution.default(u, weight, None, *ctx.geometry)
        if for_weight:
            dweight = _convolution_backward(g, u, weight, ctx.geometry, [False, True, False])[1]
        return dg, dweight, None, None


def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, geometry: Geometry, mask: list[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if mask == [True, False, False] and _takes_patches(x, weight, geometry):
        with without_autocast(g.device):
            patches = torch.tensordot(g, weight, ([1], [0]))  # (N, h, w, C, *kernel)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(x.shape), None, None
    transposed, groups = geometry[3], geometry[5]
    channels = weight.shape[1] * groups if transposed else weight.shape[0]
    dx, dweight, dbias = aten.convolution_backward.default(g, x, weight, [channels], *geometry, mask)
    return dx, dweight, dbias


def _takes_patches(x: Tensor, weight: Tensor, geometry: Geometry) -> bool:
    """Whether it is a product with each patch of an image, of a ViT's first layer, whose kernel is slow on the CPU."""
    stride, padding, dilation, transposed, _, groups = geometry
    kernel = [*weight.shape[2:]]
    apart = stride == kernel and set(padding) == {0} and set(dilation) == {1} and not transposed and groups == 1
    few = x.device.type == "cpu" and x.dim() == 4 and x.shape[1] <= 4
    return few and apart and x.shape[2] % kernel[0] == 0 and x.shape[3] % kernel[1] == 0


def sizes(value: Any, dims: int) -> list[int] | None:
    """An integer for each dimension; None where stock has something to convert, or to refuse."""
    if type(value) is int:
        return [value] * dims
    return [*value] if type(value) in (tuple, list) and [*map(type, value)] == [int] * dims else None


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Any) -> Any:
    if None in geometry:
        return NotImplemented
    dtype = autocast_dtype(x.device)
    if dtype is not None:  # what autocast does, outside of the Function, so that the casts are differentiated too
        x, weight, bias = (cast(each, dtype) for each in (x, weight, bias))
    if x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        return NotImplemented  # an error. The kernel would drop what the bias has beyond the others' precision
    if dtype is None:
        return _Convolution.apply(x, weight, bias, geometry)
    with without_autocast(x.device):
        return _Convolution.apply(x, weight, bias, geometry)


def cast(tensor: Any, dtype: torch.dtype) -> Any:
    """As autocast does: None, integers and double precision stay."""
    casts = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
    return tensor.to(dtype) if casts else tensor


def _replace(dims: int, transposed: bool) -> Any:

    def conv(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
    ) -> Any:
        if not input.dim() == weight.dim() == dims + 2:  # without a batch dimension, or an error
            return NotImplemented
        strides, dilations = sizes(stride, dims), sizes(dilation, dims)
        if padding == "same" and strides == [1] * dims and dilations:
            total = [d * (k - 1) for d, k in zip(dilations, weight.shape[2:], strict=True)]
            if any(each % 2 for each in total):  # the odd pixel goes to the end, as in stock
                input = F.pad(input, [side for each in reversed(total) for side in (0, each % 2)])
            padding = [each // 2 for each in total]
        elif padding == "valid":
            padding = 0
        return _convolution(input, weight, bias, (strides, sizes(padding, dims), dilations, False, [0] * dims, groups))

    def conv_transpose(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] = 0,
        output_padding: int | Sequence[int] = 0,
        groups: int = 1,
        dilation: int | Sequence[int] = 1,
    ) -> Any:
        if not input.dim() == weight.dim() == dims + 2:  # without a batch dimension, or an error
            return NotImplemented
        strides, paddings, dilations, extra = (
            sizes(each, dims) for each in (stride, padding, dilation, output_padding)
        )
        return _convolution(input, weight, bias, (strides, paddings, dilations, True, extra, groups))

    return conv_transpose if transposed else conv


REPLACEMENTS = {
    getattr(torch, f"conv{'_transpose' if transposed else ''}{dims}d"): _replace(dims, transposed)
    for dims in (1, 2, 3)
    for transposed in (False, True)
}
