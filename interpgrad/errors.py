"""Errors E(delta, target) between the input gradient and its target, by default the guided gradient.

Every error takes two tensors of shape (N, ...), of N samples, and returns one value per sample, shape (N,),
to be minimized. m is the number of values in a sample. Source: Torres et al., "A Learning Paradigm for
Interpretable Gradients", arXiv 2404.15024; the cosine, printed there as a similarity, is turned into a loss.
`outside` takes a mask in the place of the target.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

ErrorName = Literal["cos", "mae", "mse", "hi", "outside"]
Error = Callable[[Tensor, Tensor], Tensor]  # (delta, target) -> (N,)


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


def outside(delta: Tensor, mask: Tensor) -> Tensor:
    """`1 - sum(mask delta^2) / sum(delta^2)`: the share of delta's energy outside of the mask, in [0, 1].

    Scale-free, down to the smallest normal number of the dtype. A sample whose mask is all ones has error 0 and
    gradient 0, so an image without annotation needs no other treatment. One whose mask is all zeros has error 1
    and gradient 0; so has one of which delta is zero (or subnormal), unless its mask is all ones.

    Args:
        delta: (N, C, H, W).
        mask: of the relevant pixels, (N, 1, H, W), (N, H, W) or (N, C, H, W); bool, or in [0, 1].

    Raises:
        ValueError: the mask does not broadcast to delta.

    After Ross, Hughes, Doshi-Velez, "Right for the Right Reasons", arXiv 1703.03717, whose own formula depends on the
    scale of the gradient: it is in docs/how-to/targets.md.

    >>> outside(torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[True, False]]]))
    tensor([0.6400])
    """
    mask = mask_for(delta, mask).expand_as(delta).flatten(1).to(delta.dtype)
    delta, _, defined = _defined(delta, torch.ones_like(delta), torch.finfo(delta.dtype).tiny)
    energy = _unit_scale(delta).square()
    share = ((1 - mask) * energy).sum(1) / energy.sum(1)
    return torch.where(defined, share, (share > 0).to(share.dtype))


def mask_for(delta: Tensor, mask: Tensor) -> Tensor:
    """A mask that broadcasts to delta (N, C, H, W): itself, or with a dimension of channels if it is (N, H, W)."""
    channels = mask[:, None] if mask.dim() == delta.dim() - 1 > 1 else mask
    try:
        channels.expand_as(delta)
    except RuntimeError:
        raise ValueError(
            f"expected a mask (N, 1, H, W), (N, H, W) or (N, C, H, W) for gradients {tuple(delta.shape)}, got "
            f"{tuple(mask.shape)}."
        ) from None
    return channels


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


ERRORS: dict[str, Error] = {"cos": cos, "mae": mae, "mse": mse, "hi": hi}  # of two gradients
NAMED: dict[str, Error] = ERRORS | {"outside": outside}  # and of a gradient and a mask
