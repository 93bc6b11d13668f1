"""Batch norm whose double backward runs on native kernels.

Per channel: n values, mean mu, s = 1 / sqrt(variance + eps), xhat = (x - mu) s, y = weight xhat + bias; sums run
over all dimensions but the channel's. The backward pass is a Function of its own, (g, x, weight) ->
(dx, dweight, dbias):

    training    dx = weight s [g - sum(g)/n - xhat sum(g xhat)/n]
    evaluation  dx = weight s g                    (mu and s are constants)
    both        dweight = sum(g xhat), dbias = sum(g)

For fixed x, g -> dx is linear and self-adjoint, so for an incoming a (the gradient for dx) one more native call with a
in the place of g yields the gradient for g, and sum(a xhat), sum(a) with it. The gradients for weight and x are below.

Shapes: x, g, a (N, C, *spatial); everything per channel (C,).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from interpgrad.double_backward.engine import tensors_of, wanted

aten = torch.ops.aten


class _Kernel(NamedTuple):
    """One forward pass of the native kernel, to run its backward with."""

    training: bool
    eps: float
    implementation: int  # which one ran: native, cuDNN, ...
    reserve: Tensor

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor | None, statistics: _Statistics, mask: list[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        mean, invstd, running_mean, running_var = statistics
        dx, dweight, dbias = aten._batch_norm_impl_index_backward(
            self.implementation,
            x,
            g,
            weight,
            running_mean,
            running_var,
            mean,
            invstd,
            self.training,
            self.eps,
            mask,
            self.reserve,
        )
        return dx, dweight, dbias


_Statistics = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None"]


class _BatchNorm(Function):
    """y = weight xhat + bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        y, mean, invstd, reserve, index = aten._batch_norm_impl_index(
            x, weight, bias, running_mean, running_var, training, momentum, eps, torch.backends.cudnn.enabled
        )
        ctx.kernel = _Kernel(training, eps, index, reserve)
        ctx.tensors = tensors_of(x, weight, bias)
        running = (None, None) if training else (running_mean, running_var)
        ctx.save_for_backward(x, weight, mean, invstd, *running)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *statistics = ctx.saved_tensors
        mask = wanted(ctx, ctx.tensors)
        if torch.is_grad_enabled():
            gradients = _BatchNormBackward.apply(g, x, weight, ctx.kernel, *statistics)
            gradients = [gradient if want else None for gradient, want in zip(gradients, mask, strict=True)]
        else:
            gradients = ctx.kernel.backward(g, x, weight, statistics, mask)
        return *gradients, None, None, None, None, None


class _BatchNormBackward(Function):
    """(dx, dweight, dbias) of the backward pass, where it is to be differentiated again."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, kernel: _Kernel, *statistics: Any) -> Any:
        dx, dweight, dbias = kernel.backward(g, x, weight, statistics, [True, True, True])
        ctx.kernel = kernel
        ctx.tensors = tensors_of(g, x, weight)
        ctx.save_for_backward(g, x, weight, dweight, dbias, *statistics)
        ctx.set_materialize_grads(False)
        return dx, dweight, dbias

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, aweight: Tensor | None, abias: Tensor | None) -> Any:
        g, x, weight, sum_g_xhat, sum_g, *statistics = ctx.saved_tensors
        kernel, nothing = ctx.kernel, [None] * 5
        if torch.is_grad_enabled() or aweight is not None or abias is not None:
            return *_stock((g, x, weight), kernel, statistics[2:], (a, aweight, abias)), *nothing
        if a is None:
            return None, None, None, *nothing

        for_g, for_x, for_weight = wanted(ctx, ctx.tensors)
        dg, sum_a_xhat, sum_a = kernel.backward(a, x, weight, statistics, [for_g, True, True])
        if not (for_weight or (for_x and kernel.training)):
            return dg, None, None, *nothing

        mean, s = _mean_and_invstd(kernel, statistics)
        n = x.numel() // x.shape[1]
        sum_ag = _sum_of_product(a, g)
        if not kernel.training:
            return dg, None, s * sum_ag if for_weight else None, *nothing

        p = sum_ag - sum_a * sum_g / n
        q = sum_a_xhat * sum_g_xhat / n
        dx = None
        if for_x:
            factor = -s * s / n if weight is None else -weight * s * s / n
            of_a, of_g, of_xhat = factor * sum_g_xhat, factor * sum_a_xhat, factor * (p - 3 * q)
            of_x = of_xhat * s
            constant = -(of_a * sum_a + of_g * sum_g) / n - of_x * mean
            dx = _combine((x, a, g), (of_x, of_a, of_g), constant)
        return dg, dx, s * (p - q) if for_weight else None, *nothing


def _formula(
    g: Tensor, x: Tensor, weight: Tensor | None, kernel: _Kernel, running: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias) as printed above, in differentiable operations."""
    dims, n = [0, *range(2, x.dim())], x.numel() // x.shape[1]
    mean = x.mean(dims) if kernel.training else running[0]
    variance = x.var(dims, unbiased=False) if kernel.training else running[1]
    s = (variance + kernel.eps).rsqrt()
    xhat = (x - _channels(mean, x)) * _channels(s, x)
    dweight, dbias = (g * xhat).sum(dims), g.sum(dims)
    centred = g - (_channels(dbias, x) + xhat * _channels(dweight, x)) / n if kernel.training else g
    return _channels(s if weight is None else weight * s, x) * centred, dweight, dbias


def _stock(inputs: Any, kernel: _Kernel, running: list[Tensor], outer: Any) -> list[Tensor | None]:
    """Gradients for (g, x, weight) by stock autograd: of the third order, or where dweight and dbias are used too."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: g may itself be a function of x, and that path is not this node's to differentiate.
        g, x, weight = inputs = tuple(None if each is None else each.view_as(each) for each in inputs)
        outputs = _formula(g, x, weight, kernel, running)
    used = [(out, a) for out, a in zip(outputs, outer, strict=True) if a is not None and out.requires_grad]
    differentiable = [each for each in inputs if each is not None and each.requires_grad]
    if not used or not differentiable:
        return [None] * 3
    found = iter(
        torch.autograd.grad(
            [out for out, _ in used],
            differentiable,
            [a.to(out.dtype) for out, a in used],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    return [next(found) if each is not None and each.requires_grad else None for each in inputs]


def _mean_and_invstd(kernel: _Kernel, statistics: Any) -> tuple[Tensor, Tensor]:
    mean, invstd, running_mean, running_var = statistics
    return (mean, invstd) if kernel.training else (running_mean, (running_var + kernel.eps).rsqrt())


def _sum_of_product(a: Tensor, g: Tensor) -> Tensor:
    """sum(a g) per channel, (C,): what the native kernel calls dweight if the mean is 0 and the variance 1."""
    zero, one = _zero_and_one(a)
    result: Tensor = aten.native_batch_norm_backward(
        a, g, None, None, None, zero, one, True, 0.0, [False, True, False]
    )[1]
    return result


def _combine(tensors: tuple[Tensor, ...], factors: tuple[Tensor, ...], constant: Tensor) -> Tensor:
    """A constant + sum of factor * tensor, factors and constant per channel, in the layout of the first tensor.

    factor * tensor + constant is the native kernel's evaluation mode, at a mean of 0 and a variance of 1.
    """
    first, *others = tensors
    zero, one = _zero_and_one(first)
    factor, constant = factors[0].to(zero.dtype), constant.to(zero.dtype)
    result: Tensor = aten.native_batch_norm(first, factor, constant, zero, one, False, 0.0, 0.0)[0]
    for tensor, factor in zip(others, factors[1:], strict=True):
        result.addcmul_(tensor, _channels(factor, tensor).to(tensor.dtype))
    return result


def _zero_and_one(like: Tensor) -> tuple[Tensor, Tensor]:
    zero = torch.zeros(like.shape[1], dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    return zero, zero + 1


def _channels(value: Tensor, x: Tensor) -> Tensor:
    """(C,) as (1, C, 1, ...), to broadcast with x."""
    return value.view(1, -1, *[1] * (x.dim() - 2))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """The replacement of F.batch_norm, with its signature."""
    if input.dim() < 2 or input.numel() <= input.shape[1]:  # nothing to normalize, or one value per channel: an error
        return NotImplemented
    return _BatchNorm.apply(input, weight, bias, running_mean, running_var, training, momentum, eps)


REPLACEMENTS = {F.batch_norm: _batch_norm}
