"""Batch norm whose double backward runs on native kernels, and whose statistics can be held constant.

Per channel: n values, mean mu, s = 1 / sqrt(variance + eps), xhat = (x - mu) s, y = weight xhat + bias; sums run
over all dimensions but the channel's. The backward pass is a Function of its own:

    coupled     dx = weight s [g - sum(g)/n - xhat sum(g xhat)/n]     (training: mu and s are functions of the batch)
    constant    dx = weight s g                                       (evaluation, or a pass with frozen statistics)
    both        dweight = sum(g xhat), dbias = sum(g)

Constant statistics make it a scaling: for an incoming a (the gradient for dx) the gradient for g is weight s a, the one
for weight s sum(a g), and none is left for x. Coupled, for fixed x, g -> dx is linear and self-adjoint, so one more
native call with a in the place of g yields the gradient for g, and sum(a xhat), sum(a) with it. The gradients for
weight and x are below.

Shapes: x, g, a (N, C, *spatial); everything per channel (C,).
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interpgrad.autocast import at_least_single
from interpgrad.double_backward.engine import Function, apply_each, in_frozen_pass, needed, stock_gradients, tensors_of

aten = torch.ops.aten


Gradients = tuple["Tensor | None", "Tensor | None", "Tensor | None"]


class Kernel(NamedTuple):
    """One forward pass of the native kernel in training mode, to run its backward with."""

    eps: float
    implementation: int  # which one ran: native, cuDNN, ...
    reserve: Tensor

    def backward(
        self, g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, mask: Sequence[bool]
    ) -> Gradients:
        """(dx, dweight, dbias), where the mask is true: CUDA's kernels for channels_last return others, too."""
        gradients = aten._batch_norm_impl_index_backward.default(
            self.implementation, x, g, weight, None, None, mean, invstd, True, self.eps, mask, self.reserve
        )
        dx, dweight, dbias = (each if want else None for each, want in zip(gradients, mask, strict=True))
        return dx, dweight, dbias


class BatchNorm(Function):
    """y = weight xhat + bias. The statistics are of the batch in training mode, unless they are each sample's own."""

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
        freezable: bool,
    ) -> Tensor:
        y, mean, invstd, reserve, index = aten._batch_norm_impl_index.default(
            x, weight, bias, running_mean, running_var, training, momentum, eps, torch.backends.cudnn.enabled
        )
        if not training:
            assert running_var is not None
            mean, invstd = running_mean, (at_least_single(running_var) + eps).rsqrt()
        ctx.kernel = Kernel(eps, index, reserve) if training else None
        ctx.freezable = freezable
        ctx.tensors = tensors_of(x, weight, bias)
        ctx.save_for_backward(x, weight, mean, invstd)
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        mask = needed(ctx, ctx.tensors)
        if ctx.kernel is None or (ctx.freezable and in_frozen_pass()):
            gradients = constant_backward(g, x, weight, mean, invstd, mask)
        elif torch.is_grad_enabled():
            dx, dweight, dbias = apply_each(_BatchNormBackward, g, x, weight, mean, invstd, ctx.kernel)
            gradients = dx if mask[0] else None, dweight if mask[1] else None, dbias if mask[2] else None
        else:
            gradients = ctx.kernel.backward(g, x, weight, mean, invstd, mask)
        return *gradients, *[None] * 6


def constant_backward(
    g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, mask: Sequence[bool]
) -> Gradients:
    """(dx, dweight, dbias), where the mask is true, of constant statistics."""
    for_x, for_weight, for_bias = mask
    dx = scaling(g, weight, invstd) if for_x else None
    if torch.is_grad_enabled():
        dims = [0, *range(2, g.dim())]
        xhat = (x - channels(mean, x)) * channels(invstd.to(x.dtype), x) if for_weight else None
        return dx, None if xhat is None else (g * xhat).sum(dims), g.sum(dims) if for_bias else None
    dweight, dbias = channel_sums(g, x, mean, invstd) if for_weight or for_bias else (None, None)
    return dx, _like(dweight, weight) if for_weight else None, _like(dbias, weight) if for_bias else None


class Scaling(Function):
    """dx = weight s g."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, weight: Tensor | None, invstd: Tensor) -> Tensor:
        """The product."""
        ctx.tensors = tensors_of(g, weight)
        ctx.save_for_backward(g, weight, invstd)
        return scaling(g, weight, invstd)  # now with gradients disabled

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor | None, ...]:
        """Of any order: the operations are differentiable where they have to be."""
        g, weight, invstd = ctx.saved_tensors
        for_g, for_weight = needed(ctx, ctx.tensors)
        dg = scaling(a, weight, invstd) if for_g else None
        dweight = None
        if for_weight:
            if torch.is_grad_enabled():
                scaled_sum = (a * g).sum([0, *range(2, g.dim())]) * invstd
            else:  # g as if it were an x of mean 0
                scaled_sum = channel_sums(a, g, torch.zeros_like(invstd), invstd)[0]
            dweight = _like(scaled_sum, weight)
        return dg, dweight, None


def scaling(g: Tensor, weight: Tensor | None, invstd: Tensor) -> Tensor:
    """The product weight s g, a Function where it is to be differentiated."""
    if torch.is_grad_enabled():
        result: Tensor = apply_each(Scaling, g, weight, invstd)
        return result
    return scaled(g, invstd if weight is None else weight * invstd)


def scaled(g: Tensor, scale: Tensor) -> Tensor:
    """The product of g and (C,), rounded once, also where g is in half precision and the scale is not.

    On CUDA a product of two precisions looks at the type of each value, at twice the time of batch norm's own kernels,
    which know both: here as its evaluation mode at a mean of 0, or the gradient of that.
    """
    if scale.dtype == g.dtype:
        return g * channels(scale, g)
    if g.is_cuda and scale.dtype == torch.float32 and type(g) is Tensor:  # others may not know these kernels
        if g.is_contiguous():
            mask = [True, False, False]
            return aten.native_batch_norm_backward.default(g, g, None, scale, scale, scale, scale, False, 0.0, mask)[0]  # type: ignore[no-any-return]
        if g.dim() == 4 and g.is_contiguous(memory_format=torch.channels_last):
            return torch.batch_norm_elemt(g, None, None, torch.zeros_like(scale), scale, 0.0)
    return torch.mul(g, channels(scale, g), out=torch.empty_like(g))


class _BatchNormBackward(Function):
    """(dx, dweight, dbias) of the coupled backward pass, where it is to be differentiated again."""

    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, invstd: Tensor, kernel: Kernel
    ) -> Any:
        dx, dweight, dbias = kernel.backward(g, x, weight, mean, invstd, [True, weight is not None, weight is not None])
        if weight is None:
            dweight, dbias = channel_sums(g, x, mean, invstd)
        ctx.kernel = kernel
        ctx.tensors = tensors_of(g, x, weight)
        ctx.save_for_backward(g, x, weight, dweight, dbias, mean, invstd)
        ctx.set_materialize_grads(False)
        return dx, dweight, dbias

    @staticmethod
    def backward(ctx: Any, a: Tensor | None, aweight: Tensor | None, abias: Tensor | None) -> Any:
        g, x, weight, *sums, mean, invstd = ctx.saved_tensors
        nothing = [None] * 3
        if torch.is_grad_enabled() or aweight is not None or abias is not None:
            found = functools.partial(formula, eps=ctx.kernel.eps)
            return *stock_gradients(found, (g, x, weight), (a, aweight, abias)), *nothing
        if a is None:
            return None, None, None, *nothing
        mask = needed(ctx, ctx.tensors)
        return *double_backward(ctx.kernel, a, g, x, weight, mean, invstd, sums, mask), *nothing


def double_backward(
    kernel: Kernel,
    a: Tensor,
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    sums_of_g: Sequence[Tensor],
    mask: Sequence[bool],
) -> Gradients:
    """Coupled: gradients for (g, x, weight) where a is the gradient for dx; sums_of_g are sum(g xhat) and sum(g)."""
    for_g, for_x, for_weight = mask
    needs_sums = for_x or for_weight
    sums_of_a: Sequence[Any] = ()
    if weight is None:
        dg = kernel.backward(a, x, None, mean, invstd, [True, False, False])[0] if for_g else None
        sums_of_a = channel_sums(a, x, mean, invstd) if needs_sums else ()
    else:
        dg, *sums_of_a = kernel.backward(a, x, weight, mean, invstd, [for_g, needs_sums, needs_sums])
    if not needs_sums:
        return dg, None, None

    zero = torch.zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    one = torch.ones_like(zero)
    sum_ag = channel_sums(a, g, zero, one)[0]
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
        dx = aten.native_batch_norm.default(x, of_x, constant, zero, one, False, 0.0, 0.0)[0]
        for tensor, of_tensor in ((a, of_a), (g, of_g)):
            dx.addcmul_(tensor, channels(of_tensor, tensor).to(tensor.dtype))
    return dg, dx, invstd * torch.add(p, q, alpha=-1 / n) if for_weight else None


def channel_sums(g: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> tuple[Tensor, Tensor]:
    """sum(g xhat) and sum(g): what the native kernel calls dweight and dbias, in at least single precision.

    It is given a weight it has no use for (invstd), since CUDA allocates the result like that.
    """
    mean, invstd = at_least_single(mean), at_least_single(invstd)
    mask = [False, True, True]
    _, *sums = aten.native_batch_norm_backward.default(g, dense(x), invstd, None, None, mean, invstd, True, 0.0, mask)
    return sums[0], sums[1]


def formula(g: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dweight, dbias), coupled, as printed above, in differentiable operations."""
    dims, n = [0, *range(2, x.dim())], x.numel() // x.shape[1]
    s = (x.var(dims, unbiased=False) + eps).rsqrt()
    xhat = (x - channels(x.mean(dims), x)) * channels(s, x)
    dweight, dbias = (g * xhat).sum(dims), g.sum(dims)
    centred = g - (channels(dbias, x) + xhat * channels(dweight, x)) / n
    return channels(s if weight is None else weight * s, x) * centred, dweight, dbias


def channels(value: Tensor, x: Tensor) -> Tensor:
    """(C,) as (1, C, 1, ...), to broadcast with x."""
    return value.view(1, -1, *[1] * (x.dim() - 2))


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it, contiguous in a memory format: what cuDNN takes, and saves, of a slice or a transposed x.

    Outside of a Function: a copy that one made and saved would have no path back to x.
    """
    formats = [torch.contiguous_format]
    formats += [torch.channels_last] if x.dim() == 4 else [torch.channels_last_3d] if x.dim() == 5 else []

    def is_dense(tensor: Tensor) -> bool:
        return any(tensor.is_contiguous(memory_format=each) for each in formats)

    if is_dense(x):
        return x
    copy = x.clone()  # keeps the order of the dimensions
    return copy if is_dense(copy) else copy.contiguous()


def _like(gradient: Tensor | None, weight: Tensor | None) -> Tensor | None:
    """In the precision of the weight."""
    return gradient if gradient is None or weight is None else gradient.to(weight.dtype)


def _is_usual(
    x: Tensor, affine: Sequence[Any], statistics: Sequence[Any], training: Any, momentum: Any, eps: Any
) -> bool:
    """Whether stock has nothing to convert, and nothing to refuse before the kernel would."""
    dtypes = (x.dtype, torch.promote_types(x.dtype, torch.float32))
    given = [each for each in (*affine, *statistics) if each is not None]
    vectors = all(isinstance(each, Tensor) and each.dim() == 1 and each.dtype in dtypes for each in given)
    plain = type(training) is bool and _is_number(momentum) and _is_number(eps) and eps > 0
    return vectors and plain and not any(each is not None and each.requires_grad for each in statistics)


def _is_number(value: Any) -> bool:
    """Whether stock takes it for a real one, of Python or numpy: it refuses fractions."""
    return isinstance(value, (float, numbers.Integral)) or (
        isinstance(value, numbers.Real) and not isinstance(value, numbers.Rational)
    )


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
    """The replacement of F.batch_norm, with its signature.

    Of one row, where inference has no running statistics, they are no batch's: so are weights standardized.
    """
    if input.dim() < 2 or input.numel() <= input.shape[1]:  # nothing to normalize, or one value per channel: an error
        return NotImplemented
    if not _is_usual(input, (weight, bias), (running_mean, running_var), training, momentum, eps):
        return NotImplemented
    input, weight = dense(input), weight if weight is None else weight.contiguous()
    freezable = len(input) > 1 or running_mean is not None
    settings = training, float(momentum), float(eps), freezable
    return BatchNorm.apply(input, weight, bias, running_mean, running_var, *settings)


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    """The replacement of F.instance_norm, with its signature: batch norm of (1, N C, *spatial), as stock has it.

    Inference normalizes with each sample's own statistics, which are part of the network's function, unless there are
    running ones.
    """
    if not _is_usual(input, (weight, bias), (running_mean, running_var), use_input_stats, momentum, eps):
        return NotImplemented
    if (running_mean is None) != (running_var is None) or (running_mean is None and not use_input_stats):  # errors
        return NotImplemented
    samples, channels = input.shape[:2] if input.dim() > 2 else (input.numel(), 1)
    if input.numel() <= samples * channels:  # nothing to normalize, or one value per channel: an error
        return NotImplemented
    running = [None if each is None else each.repeat(samples) for each in (running_mean, running_var)]
    affine = [None if each is None else each.repeat(samples) for each in (weight, bias)]
    rows = input.contiguous().view(1, samples * channels, *input.shape[2:])
    settings = use_input_stats, float(momentum), float(eps), running_mean is not None
    y = BatchNorm.apply(rows, *affine, *running, *settings)
    for own, new in zip((running_mean, running_var), running, strict=True):
        if own is not None and new is not None and use_input_stats:
            own.copy_(new.view(samples, channels).mean(0))
    return y.view(input.shape)


def _of_torch(replacement: Any, flag: str) -> Any:
    """The replacement of torch's function, which takes the same arguments in another order."""
    names = ("input", "weight", "bias", "running_mean", "running_var", flag, "momentum", "eps", "cudnn_enabled")

    def reordered(*args: Any, **named: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | named
        given.pop("cudnn_enabled", None)
        return replacement(**given)

    return reordered


REPLACEMENTS = {
    F.batch_norm: _batch_norm,
    torch.batch_norm: _of_torch(_batch_norm, "training"),
    F.instance_norm: _instance_norm,
    torch.instance_norm: _of_torch(_instance_norm, "use_input_stats"),
}
