"""Scaled dot-product attention: fused kernels have no double backward, and the math kernel's is slow in half precision.

For queries, keys and values Q, K, V, a bias B (the mask) and the scale s:

    forward     P = softmax(s Q K^T + B),    O = P V
    backward    X = dO V^T,    dS = P * (X - rowsum(P * X)),    dQ = s dS K,    dK = s dS^T Q,    dB = dS

The products with V are stock's. The weights P are a Function, and so is their backward pass from X to dQ, dK and dB.
For incoming a, b, e (the gradients for these), with W = s (a K^T + Q b^T) + e, the gradients are

    for X   P * (W - rowsum(P * W))                         for Q   s dS b
    for P   W * (X - rowsum(P * X)) - X rowsum(P * W)       for K   s dS^T a

In half precision the scores s Q K^T and their softmax are computed in single precision, as in the fused kernels. All
other products are of the inputs as they are, while the math kernel converts everything.

Shapes: Q (N, L, E), K (N, S, E), V (N, S, F), P (N, L, S), N the product of all before; B (..., L, S), to broadcast.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from interpgrad import private
from interpgrad.autocast import at_least_single, autocast_dtype, without_autocast
from interpgrad.cleanup import OfAllThreads
from interpgrad.double_backward.conv import cast
from interpgrad.double_backward.engine import Function, apply_each, stock_gradients

aten = torch.ops.aten

# Below these, layers may attend; the second calls the first where no function mode sees it.
FUNCTIONS = (F.scaled_dot_product_attention, F.multi_head_attention_forward)

differentiable_attention = OfAllThreads(
    private.enabled_attention, private.enable_attention, lambda enabled: {name: name == "math" for name in enabled}
)


class _Settings(NamedTuple):
    """The scale s, the shape of the scores (..., L, S), and the shape and dtype of a bias with a gradient."""

    scale: float
    scores: tuple[int, ...]
    bias: tuple[torch.Size, torch.dtype] | None


class Weights(Function):
    """P."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor:
        """The softmax; a row that is masked as a whole is zeros, as in stock."""
        scores = _scores(q, k).mul_(settings.scale)
        if bias is None:
            p = scores.softmax(-1)
        else:
            nothing = (bias == -math.inf).all(-1, keepdim=True)
            p = (scores.view(settings.scores) + bias.masked_fill(nothing, 0)).softmax(-1)
            p = p.masked_fill_(nothing, 0).view(scores.shape)
        p = p.to(q.dtype)
        ctx.settings = settings
        ctx.save_for_backward(q, k, p)
        return p

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> tuple[Tensor | None, ...]:
        """Of any order."""
        q, k, p = ctx.saved_tensors
        with without_autocast(x.device):
            if torch.is_grad_enabled():
                return *apply_each(_WeightsBackward, x, q, k, p, ctx.settings), None
            return *_backward(q, k, _of_softmax(x, p), ctx.settings), None


class _WeightsBackward(Function):
    """(dQ, dK, dB), where they are to be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor, k: Tensor, p: Tensor, settings: _Settings) -> Any:
        ds = _of_softmax(x, p)
        ctx.settings = settings
        ctx.save_for_backward(x, q, k, p, ds)
        return _backward(q, k, ds, settings)

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor, e: Tensor | None) -> Any:
        x, q, k, p, ds = ctx.saved_tensors
        with without_autocast(x.device):
            if torch.is_grad_enabled() or any(each is not None and private.is_batched(each) for each in (a, b, e)):
                formula = functools.partial(_formula, settings=ctx.settings)
                return *stock_gradients(formula, (x, q, k, p), (a, b, e)), None
            return *_double_backward(a, b, e, x, q, k, p, ds, ctx.settings), None


def _double_backward(
    a: Tensor, b: Tensor, e: Tensor | None, x: Tensor, q: Tensor, k: Tensor, p: Tensor, ds: Tensor, settings: _Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients for X, Q, K and P, as printed above."""
    s = settings.scale
    w = torch.baddbmm(p, a, k.mT, beta=0, alpha=s).baddbmm_(q, b.mT, alpha=s)
    if e is not None:
        w.view(settings.scores).add_(e)
    sum_x, sum_w = ((p * each).sum(-1, keepdim=True) for each in (x, w))
    for_p = (x - sum_x).mul_(w).addcmul_(x, sum_w, value=-1)
    for_q, for_k = torch.baddbmm(q, ds, b, beta=0, alpha=s), torch.baddbmm(k, ds.mT, a, beta=0, alpha=s)
    return _of_softmax(w, p), for_q, for_k, for_p


def _backward(q: Tensor, k: Tensor, ds: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor | None]:
    """(dQ, dK, dB), as printed above."""
    s = settings.scale
    dq, dk = torch.baddbmm(q, ds, k, beta=0, alpha=s), torch.baddbmm(k, ds.mT, q, beta=0, alpha=s)
    return dq, dk, _for_bias(ds, settings)


def _formula(x: Tensor, q: Tensor, k: Tensor, p: Tensor, settings: _Settings) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same from X, in differentiable operations."""
    ds = p * (x - (p * x).sum(-1, keepdim=True))
    return settings.scale * ds @ k, settings.scale * ds.mT @ q, _for_bias(ds, settings)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Q K^T, in at least single precision."""
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and torch.version.cuda:
        return torch.bmm(q, k.mT, out_dtype=torch.float32)
    return torch.bmm(at_least_single(q), at_least_single(k).mT)


def _of_softmax(x: Tensor, p: Tensor) -> Tensor:
    """P * (X - rowsum(P * X)), summed in at least single precision."""
    gradient: Tensor = aten._softmax_backward_data.default(x, p, -1, x.dtype)
    return gradient


def _for_bias(gradient: Tensor, settings: _Settings) -> Tensor | None:
    if settings.bias is None:
        return None
    shape, dtype = settings.bias
    return gradient.view(settings.scores).sum_to_size(shape).to(dtype)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """The replacement of F.scaled_dot_product_attention, with its signature.

    Groups of queries and what is broadcast is left to the math kernel, as is what stock refuses.
    """
    *lead, length, width = query.shape
    sizes = {tuple(key.shape[:-1]), tuple(value.shape[:-1])}
    if not lead or enable_gqa or query.numel() == 0 or sizes != {(*lead, key.shape[-2])}:
        return NotImplemented
    if 0 in (*key.shape, *value.shape) or key.shape[-1] != width or (attn_mask is not None and is_causal):
        return NotImplemented
    dtype, scores = autocast_dtype(query.device), (*lead, length, key.shape[-2])
    if dtype is not None:
        query, key, value, attn_mask = (cast(each, dtype) for each in (query, key, value, attn_mask))
    bias = _bias(attn_mask, is_causal, query, scores)
    if bias is NotImplemented or not query.dtype == key.dtype == value.dtype:
        return NotImplemented
    learned = (bias.shape, bias.dtype) if bias is not None and bias.requires_grad else None
    settings = _Settings(1 / math.sqrt(width) if scale is None else scale, scores, learned)
    with without_autocast(query.device):
        q, k, v = (each.reshape(-1, *each.shape[-2:]) for each in (query, key, value))
        p = torch.dropout(Weights.apply(q, k, bias, settings), dropout_p, True)
        return torch.bmm(p, v).view(*lead, length, value.shape[-1])


def _bias(mask: Tensor | None, is_causal: bool, query: Tensor, scores: tuple[int, ...]) -> Any:
    """What is added to the scores: none, a mask of numbers, or -inf where a mask of booleans is false."""
    if is_causal:
        mask = torch.ones(scores[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
    fits = mask.dtype in (query.dtype, torch.float32) and mask.dim() <= len(scores)
    pairs = zip(reversed(mask.shape), reversed(scores), strict=False)
    return mask if fits and all(own in (1, size) for own, size in pairs) else NotImplemented


REPLACEMENTS = {F.scaled_dot_product_attention: _attention}
