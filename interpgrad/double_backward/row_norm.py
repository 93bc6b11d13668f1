"""Layer norm and group norm, differentiated twice by their own kernels.

Both normalize rows of D values: one row per position (layer norm), or per sample and group (group norm). With s and
xhat as of batch norm, but per row, and a weight that multiplies outside of the rows:

    y = weight xhat + bias,    dx = T(weight g),    dweight = sum(g xhat),    dbias = sum(g)
    T(h) = s [h - mean(h) - xhat mean(h xhat)]

T, the backward pass without a weight, is linear and self-adjoint for fixed x. So for an incoming a (the gradient for
dx) the gradient for g is weight T(a), for weight sum(g T(a)), and for x, with h = weight g and means over a row,

    -s [mean(a T(h)) xhat + mean(h xhat) T(a) + mean(a xhat) T(h)]

Shapes: x, g, a as the user's; mean and invstd, of a row each, as the kernels return them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interpgrad import private
from interpgrad.autocast import autocast_dtype
from interpgrad.double_backward import batch_norm
from interpgrad.double_backward.batch_norm import Gradients
from interpgrad.double_backward.engine import Function, apply_each, needed, stock_gradients, tensors_of

aten = torch.ops.aten

_AS_GIVEN = ("cpu",)  # where autocast leaves both norms alone; elsewhere it runs them in single precision


class _Layer(NamedTuple):
    """Rows are the last dimensions, which have this shape."""

    shape: Sequence[int]
    eps: float

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, invstd = aten.native_layer_norm.default(x, self.shape, weight, bias, self.eps)
        return y, mean, invstd

    def backward(self, g: Tensor, x: Tensor, saved: Sequence[Any], mask: Sequence[bool]) -> Gradients:
        weight, bias, mean, invstd = saved
        dx, dweight, dbias = aten.native_layer_norm_backward.default(g, x, self.shape, mean, invstd, weight, bias, mask)
        return dx, dweight, dbias

    def weighted(self, g: Tensor, weight: Tensor | None) -> Tensor:
        return g if weight is None else g * weight.to(g.dtype)

    def sum(self, g: Tensor) -> Tensor:
        """Over what shares a weight."""
        return g.reshape(-1, *self.shape).sum(0)


class _Group(NamedTuple):
    """Rows are the channels of one of so many groups."""

    groups: int
    eps: float

    def forward(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, invstd = aten.native_group_norm.default(x, weight, bias, *self._sizes(x), self.eps)
        return y, mean, invstd

    def backward(self, g: Tensor, x: Tensor, saved: Sequence[Any], mask: Sequence[bool]) -> Gradients:
        weight, _, mean, invstd = saved
        g = g.contiguous(memory_format=_memory_format(x))
        if weight is None:  # no kernel gives the gradient for the bias then, in every release and on every device
            dx = aten.native_group_norm_backward.default(
                g, x, mean, invstd, None, *self._sizes(x), [mask[0], False, False]
            )[0]
            return dx, None, self.sum(g) if mask[2] else None
        dx, dweight, dbias = aten.native_group_norm_backward.default(g, x, mean, invstd, weight, *self._sizes(x), mask)
        return dx, dweight, dbias

    def weighted(self, g: Tensor, weight: Tensor | None) -> Tensor:
        return g if weight is None else g * weight.to(g.dtype).view(-1, *[1] * (g.dim() - 2))

    def sum(self, g: Tensor) -> Tensor:
        """Over what shares a weight."""
        return g.sum([0, *range(2, g.dim())])

    def _sizes(self, x: Tensor) -> tuple[int, int, int, int]:
        samples, channels = x.shape[:2]
        return samples, channels, x.numel() // (samples * channels), self.groups


class _RowNorm(Function):
    """y = weight xhat + bias."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: _Layer | _Group) -> Tensor:
        y, mean, invstd = norm.forward(x, weight, bias)
        ctx.norm = norm
        ctx.tensors = tensors_of(x, weight, bias)
        ctx.save_for_backward(x, weight, bias, mean, invstd)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        mask = needed(ctx, ctx.tensors)
        if torch.is_grad_enabled():
            return *apply_each(_RowNormBackward, g, x, *saved, ctx.norm, mask), None
        return *ctx.norm.backward(g, x, saved, mask), None


class _RowNormBackward(Function):
    """(dx, dweight, dbias) of the backward pass, where it is to be differentiated again."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, *others: Any) -> Gradients:
        bias, mean, invstd, norm, mask = others
        ctx.norm = norm
        ctx.tensors = tensors_of(g, x, weight)
        ctx.save_for_backward(g, x, weight, mean, invstd)
        ctx.set_materialize_grads(False)
        gradients: Gradients = norm.backward(g, x, (weight, bias, mean, invstd), mask)
        return gradients

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, aweight: Tensor | None, abias: Tensor | None) -> Any:
        g, x, weight, mean, invstd = ctx.saved_tensors
        nothing = [None] * 5
        batched = a is not None and private.is_batched(a)
        if torch.is_grad_enabled() or batched or aweight is not None or abias is not None:
            formula = functools.partial(_formula, norm=ctx.norm, rows=mean.numel())
            return *stock_gradients(formula, (g, x, weight), (a, aweight, abias)), *nothing
        if a is None:
            return None, None, None, *nothing

        for_g, for_x, for_weight = needed(ctx, ctx.tensors)
        norm, ones = ctx.norm, None if weight is None else torch.ones_like(weight)  # of the dtype the kernels expect
        t = norm.backward(a, x, (ones, None, mean, invstd), [True, False, False])[0]
        dx = None
        if for_x:
            u = norm.backward(g, x, (weight, None, mean, invstd), [True, False, False])[0]
            dx = _for_x(a, norm.weighted(g, weight), norm.forward(x, ones, None)[0], t, u, invstd)
        dweight = norm.sum(g * t) if for_weight else None
        return norm.weighted(t, weight) if for_g else None, dx, dweight, *nothing


def _for_x(a: Tensor, h: Tensor, xhat: Tensor, of_a: Tensor, of_h: Tensor, invstd: Tensor) -> Tensor:
    """The gradient for x as printed above, row by row."""
    a, h, result, of_a, of_h = (each.reshape(invstd.numel(), -1) for each in (a, h, xhat, of_a, of_h))
    product, scale = torch.empty_like(result), -invstd.view(-1, 1)

    def mean(one: Tensor, other: Tensor) -> Tensor:
        return (torch.mul(one, other, out=product).mean(1, keepdim=True) * scale).to(product.dtype)

    factors = mean(a, of_h), mean(h, result), mean(a, result)
    return result.mul_(factors[0]).addcmul_(of_a, factors[1]).addcmul_(of_h, factors[2]).view(xhat.shape)


def _formula(
    g: Tensor, x: Tensor, weight: Tensor | None, norm: _Layer | _Group, rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) as printed above, in differentiable operations."""
    h, x_rows = (_as_rows(each, rows) for each in (norm.weighted(g, weight), x))
    dx = batch_norm.formula(h, x_rows, None, norm.eps)[0].view(x.shape)
    xhat = F.layer_norm(x_rows, x_rows.shape[2:], eps=norm.eps).view(x.shape)
    return dx, norm.sum(g * xhat), norm.sum(g)


def _as_rows(tensor: Tensor, rows: int) -> Tensor:
    return tensor.reshape(1, rows, -1)


def _memory_format(x: Tensor) -> torch.memory_format:
    """What native group norm takes: channels_last on the CPU only."""
    channels_last = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    suits = x.device.type == "cpu" and x.dim() in (4, 5) and x.is_contiguous(memory_format=channels_last)
    return channels_last if suits else torch.contiguous_format


def _row_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, norm: _Layer | _Group) -> Any:
    if x.device.type not in _AS_GIVEN and autocast_dtype(x.device) is not None:
        single = (each if each is None or each.dtype == torch.float64 else each.float() for each in (x, weight, bias))
        return _RowNorm.apply(*single, norm)
    return _RowNorm.apply(x, weight, bias, norm)


def _is_usual(weight: Any, bias: Any, eps: Any) -> bool:
    """Whether stock has nothing to convert, and nothing to refuse before the kernel would."""
    return type(eps) is float and all(each is None or isinstance(each, Tensor) for each in (weight, bias))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    usual = isinstance(normalized_shape, (tuple, list)) and {*map(type, normalized_shape)} == {int}
    if not usual or not _is_usual(weight, bias, eps):
        return NotImplemented
    if input.numel() == 0 or [*input.shape[-len(normalized_shape) :]] != [*normalized_shape]:
        return NotImplemented  # nothing to normalize, or an error
    return _row_norm(input, weight, bias, _Layer(normalized_shape, eps))


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    if type(num_groups) is not int or not _is_usual(weight, bias, eps):
        return NotImplemented
    if input.dim() < 2 or input.numel() == 0 or num_groups < 1 or input.shape[1] % num_groups:
        return NotImplemented
    if input.numel() == len(input) * num_groups:  # one value per row: an error
        return NotImplemented
    return _row_norm(input.contiguous(memory_format=_memory_format(input)), weight, bias, _Group(num_groups, eps))


REPLACEMENTS = {F.layer_norm: _layer_norm, F.group_norm: _group_norm}
