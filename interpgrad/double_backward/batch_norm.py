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

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from interpgrad.double_backward.engine import stock_gradients, tensors_of, wanted

aten = torch.ops.aten


Statistics = tuple["Tensor | None", ...]  # mean and 1 / sigma of the batch, running mean and variance
Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


class Kernel(NamedTuple):
    """One forward pass of the native kernel, to run its backward with."""

    training: bool
    eps: float
    implementation: int  # which one ran: native, cuDNN, ...
    reserve: Tensor

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor | None, statistics: Statistics, mask: Sequence[bool]
    ) -> Gradients:
        """(dx, dweight, dbias), where the mask is true."""
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
        ctx.kernel = Kernel(training, eps, index, reserve)
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
    def forward(ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, kernel: Kernel, *statistics: Any) -> Any:
        dx, dweight, dbias = kernel.backward(g, x, weight, statistics, [True, True, True])
        ctx.kernel = kernel
        ctx.tensors = tensors_of(g, x, weight)
        ctx.save_for_backward(g, x, weight, dweight, dbias, *statistics)
        ctx.set_materialize_grads(False)
        return dx, dweight, dbias

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, aweight: Tensor | None, abias: Tensor | None) -> Any:
        g, x, weight, *sums, mean, invstd, running_mean, running_var = ctx.saved_tensors
        kernel, nothing = ctx.kernel, [None] * 5
        if torch.is_grad_enabled() or aweight is not None or abias is not None:
            found = functools.partial(formula, kernel=kernel, running=(running_mean, running_var))
            return *stock_gradients(found, (g, x, weight), (a, aweight, abias)), *nothing
        if a is None:
            return None, None, None, *nothing
        statistics = mean, invstd, running_mean, running_var
        return *double_backward(kernel, a, g, x, weight, statistics, sums, wanted(ctx, ctx.tensors)), *nothing


def double_backward(
    kernel: Kernel,
    a: Tensor,
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: Statistics,
    sums_of_g: Sequence[Tensor | None],
    mask: Sequence[bool],
) -> Gradients:
    """Gradients for (g, x, weight) where a is the gradient for dx; sums_of_g are sum(g xhat) and sum(g)."""
    for_g, for_x, for_weight = mask
    dg, *sums_of_a = kernel.backward(a, x, weight, statistics, [for_g, True, True])
    if not (for_weight or (for_x and kernel.training)):
        return dg, None, None

    zero = torch.zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    one = torch.ones_like(zero)
    # What the native kernel calls dweight, if the mean is 0 and the variance 1.
    sum_ag = aten.native_batch_norm_backward(a, g, None, None, None, zero, one, True, 0.0, [False, True, False])[1]
    mean, invstd, _, running_var = statistics
    if not kernel.training:
        assert running_var is not None
        return dg, None, sum_ag * (running_var + kernel.eps).rsqrt()

    n = x.numel() // x.shape[1]
    small: Any = (*sums_of_a, *sums_of_g, mean, invstd)  # in half precision where the parameters are
    sum_a_xhat, sum_a, sum_g_xhat, sum_g, mean, invstd = (each.to(zero.dtype) for each in small)
    p, q = torch.addcmul(sum_ag, sum_a, sum_g, value=-1 / n), sum_a_xhat * sum_g_xhat
    dx = None
    if for_x:
        factor = invstd.square() / -n if weight is None else weight * invstd.square() / -n
        of_a, of_g = factor * sum_g_xhat, factor * sum_a_xhat
        of_x = factor * invstd * torch.add(p, q, alpha=-3 / n)
        constant = ((of_a * sum_a).addcmul_(of_g, sum_g) / -n).addcmul_(of_x, mean, value=-1)
        # of_x x + constant is the native kernel's evaluation mode, at a mean of 0 and a variance of 1.
        dx = aten.native_batch_norm(x, of_x, constant, zero, one, False, 0.0, 0.0)[0]
        for tensor, of_tensor in ((a, of_a), (g, of_g)):
            dx.addcmul_(tensor, _channels(of_tensor, tensor).to(tensor.dtype))
    return dg, dx, invstd * torch.add(p, q, alpha=-1 / n) if for_weight else None


def formula(
    g: Tensor, x: Tensor, weight: Tensor | None, kernel: Kernel, running: Sequence[Any]
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
