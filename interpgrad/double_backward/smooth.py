"""GELU and SiLU, whose second derivative is written out; stock's double backward is some twenty passes over memory.

    GELU           f'' = phi(x) (2 - x^2), with phi the density of the normal distribution
    GELU of tanh   f'' = (1 - t^2) (2 u' - b - x t u'^2), with t = tanh(u), u' = b (1 + 3 c x^2), b = sqrt(2 / pi)
    SiLU           f'' = s (1 - s) (2 + x (1 - 2 s)), with s the sigmoid of x
    hardsigmoid    f'' = 0; PyTorch has no double backward of it, so that MobileNetV3's gates could not be trained

The backward pass dx = g f'(x) is a Function of its own: for an incoming u the gradient for g is u f'(x), by the same
kernel, and the one for x is u g f''(x).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from interpgrad import private
from interpgrad.autocast import at_least_single
from interpgrad.double_backward.engine import Function, apply_each
from interpgrad.double_backward.on_views import in_place

aten = torch.ops.aten


class Gelu(Function):
    """y = x Phi(x), or its approximation by tanh(u), u = b (x + c x^3)."""

    operation = "Gelu"

    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str) -> Tensor:
        ctx.approximate = approximate
        ctx.save_for_backward(x)
        y: Tensor = aten.gelu.default(x, approximate=approximate)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _backward(g, ctx.saved_tensors[0], *_GELU[ctx.approximate]), None


class Silu(Function):
    """y = x sigmoid(x). In place, on y; x, a copy from outside of the Function, is then what is differentiated."""

    operation = "Silu"

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None) -> Tensor:
        ctx.save_for_backward(x)
        if y is not None:
            ctx.mark_dirty(y)
        result: Tensor = aten.silu.default(x) if y is None else aten.silu_.default(y)
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return _backward(g, ctx.saved_tensors[0], aten.silu_backward.default, _silu_second), None


class Hardsigmoid(Function):
    """y = clamp(x / 6 + 1 / 2, 0, 1)."""

    operation = "Hardsigmoid"

    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        ctx.save_for_backward(x.clone() if inplace else x)
        if inplace:
            ctx.mark_dirty(x)
        y: Tensor = aten.hardsigmoid_.default(x) if inplace else aten.hardsigmoid.default(x)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return _backward(g, x.detach(), aten.hardsigmoid_backward.default, None), None


Second = Callable[[Tensor], Tensor]


def _backward(g: Tensor, x: Tensor, first: Any, second: Second | None) -> Tensor:
    """The product dx = g f'(x), a Function where it is to be differentiated again."""
    dx: Tensor = apply_each(_Backward, g, x, first, second) if torch.is_grad_enabled() else first(g, x)
    return dx


class _Backward(Function):
    """dx = g f'(x). Without a second derivative x is a constant."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, first: Any, second: Second | None) -> Tensor:
        ctx.derivatives = first, second
        ctx.save_for_backward(None if second is None else g, x)
        dx: Tensor = first(g, x)
        return dx

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Of any order: the operations are differentiable where they have to be."""
        g, x = ctx.saved_tensors
        first, second = ctx.derivatives
        dx = None
        if second is not None:
            dx = second(at_least_single(x)).mul_(g)
            dx = (dx * u if private.is_batched(u) else dx.mul_(u)).to(x.dtype)
        return _backward(u, x, first, second), dx, None, None


def _gelu_second(x: Tensor) -> Tensor:
    """A new tensor, like that below. In place: what takes the time is memory that was not touched before."""
    square = x.square()
    density = (square * -0.5).exp_()
    return square.sub_(2).mul_(density).mul_(-1 / math.sqrt(2 * math.pi))


def _gelu_of_tanh_second(x: Tensor) -> Tensor:
    square, b, c = x.square(), math.sqrt(2 / math.pi), 0.044715
    t = (square * c).add_(1).mul_(x).mul_(b).tanh_()
    slope = square.mul_(3 * b * c).add_(b)
    factor = slope.square().mul_(x).mul_(t).neg_().add_(slope, alpha=2).sub_(b)
    second: Tensor = aten.tanh_backward.default(factor, t)
    return second


def _silu_second(x: Tensor) -> Tensor:
    s = x.sigmoid()
    factor = (s * -2).add_(1).mul_(x).add_(2)
    second: Tensor = aten.sigmoid_backward.default(factor, s)
    return second


_GELU = {
    "none": (aten.gelu_backward.default, _gelu_second),
    "tanh": (functools.partial(aten.gelu_backward.default, approximate="tanh"), _gelu_of_tanh_second),
}


def _gelu(input: Tensor, approximate: str = "none") -> Any:
    return Gelu.apply(input, approximate) if approximate in _GELU else NotImplemented


def _silu(input: Tensor, inplace: bool = False) -> Any:
    return Silu.apply(input.clone(), input) if inplace else Silu.apply(input, None)


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Any:
    return Hardsigmoid.apply(input, inplace)


REPLACEMENTS = {F.gelu: _gelu, F.silu: in_place(F.silu, _silu), F.hardsigmoid: in_place(F.hardsigmoid, _hardsigmoid)}
