"""Errors E(delta, guided) between the input gradient and the guided input gradient.

Every error takes two tensors of shape (N, ...), the gradients of N samples, and returns one value per
sample, shape (N,), to be minimized. m is the number of values in a sample. Source: Torres et al.,
"A Learning Paradigm for Interpretable Gradients", arXiv 2404.15024; the cosine, printed there as a
similarity, is turned into a loss.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def cos(delta: Tensor, guided: Tensor) -> Tensor:
    """`1 - <delta, guided> / (||delta||_2 ||guided||_2)`, in [0, 2].

    Scale-free: neither argument's magnitude matters, down to the smallest normal number of the dtype. A
    sample of which either argument is zero (or subnormal) has error 1 and gradient 0.

    >>> cos(torch.tensor([[3.0, 4.0]]), torch.tensor([[4e-30, 3e-30]]))
    tensor([0.0400])
    """
    delta, guided, defined = _defined(delta, guided, torch.finfo(delta.dtype).tiny)
    delta, guided = _unit_scale(delta), _unit_scale(guided)
    similarity = (delta * guided).sum(1) / (delta.norm(dim=1) * guided.norm(dim=1))
    return 1 - torch.where(defined, similarity, 0)


def mae(delta: Tensor, guided: Tensor) -> Tensor:
    """`||delta - guided||_1 / m`.

    >>> mae(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 2.0]]))
    tensor([1.5000])
    """
    return (delta - guided).flatten(1).abs().mean(1)


def mse(delta: Tensor, guided: Tensor) -> Tensor:
    """`||delta - guided||_2^2 / m`.

    >>> mse(torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 2.0]]))
    tensor([2.5000])
    """
    return (delta - guided).flatten(1).square().mean(1)


def hi(delta: Tensor, guided: Tensor) -> Tensor:
    """Histogram intersection, `-sum_i min(|delta_i|, |guided_i|) / (||delta||_1 ||guided||_1)`, at most 0.

    Not scale-free: it grows without bound as the gradients vanish, as printed in the paper. A sample of
    which either argument's squared norm underflows (below 1e-19 in single precision) has error 0 and
    gradient 0; its gradient would overflow.

    >>> hi(torch.tensor([[3.0, 1.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([-0.2500])
    """
    delta, guided, defined = _defined(delta, guided, torch.finfo(delta.dtype).tiny ** 0.5)
    intersection = torch.minimum(delta.abs(), guided.abs()).sum(1)
    # Divided one after the other: the product of two small norms underflows.
    overlap = intersection / delta.abs().sum(1) / guided.abs().sum(1)
    return -torch.where(defined, overlap, 0)


def _defined(delta: Tensor, guided: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor]:
    """Both gradients as (N, m), and (N,) bool: samples where the magnitude of both reaches `least`.

    The other samples are replaced by ones before anything divides by their norm; masking the result alone
    would leave NaN in the backward pass.
    """
    delta, guided = delta.flatten(1), guided.flatten(1)
    zero = (_largest(delta) < least) | (_largest(guided) < least)
    return torch.where(zero, 1, delta), torch.where(zero, 1, guided), ~zero.squeeze(1)


def _unit_scale(gradient: Tensor) -> Tensor:
    """Every sample divided by its largest magnitude, a constant, so that squares do not underflow."""
    return gradient / _largest(gradient)


def _largest(gradient: Tensor) -> Tensor:
    """(N, 1): the largest magnitude of each sample, detached."""
    return gradient.detach().abs().amax(1, keepdim=True)


ERRORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"cos": cos, "mae": mae, "mse": mse, "hi": hi}
