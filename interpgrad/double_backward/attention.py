"""Scaled dot-product attention: fused kernels have no double backward, and the math kernel's is slow.

For queries, keys and values Q, K, V, a bias B (the mask) and the scale s:

    forward     P = softmax(s Q K^T + B),    O = P V
    backward    dS = J(g V^T),    dQ = s dS K,    dK = s dS^T Q,    dV = P^T g,    dB = dS

with J(X) = P * X - P rowsum(P * X), the softmax's own backward pass. For incoming a, b, c, e (the gradients for dQ, dK,
dV, dB), with X = g V^T and W = s (a K^T + Q b^T) + e, the gradients are

    for g   P c + J(W) V                       for V   J(W)^T g
    for Q   s (dS b + Z K)                     for K   s (dS^T a + Z^T Q)        for B   Z
    Z = J(W * (X - rowsum(P * X)) - X rowsum(P * W) + g c^T)

In half precision the scores s Q K^T and their softmax are computed in single precision, as in the fused kernels; all
other products on the inputs' own units, while the math kernel converts everything.

Shapes: Q, g (N, L, E), K, V (N, S, E), P (N, L, S), with N the product of what is before; B (..., L, S), to broadcast.
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
    """The scale s, and the shape of the scores (..., L, S)."""

    scale: float
    scores: tuple[int, ...]


class Attention(Function):
    """O = P V."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor:
        p = _softmax(_scores(q, k).mul_(settings.scale), bias, settings).to(q.dtype)
        ctx.settings = settings
        ctx.save_for_backward(q, k, v, bias, p)
        return torch.bmm(p, v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            return *apply_each(_AttentionBackward, g, *ctx.saved_tensors, ctx.settings), None
        q, k, v, bias, p = ctx.saved_tensors
        return *_backward(g, q, k, v, bias, p, ctx.settings)[0], None


class _AttentionBackward(Function):
    """(dQ, dK, dV, dB) of the backward pass, where it is to be differentiated again."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *others: Any) -> Any:
        p, ctx.settings = others
        gradients, x, ds = _backward(g, q, k, v, bias, p, ctx.settings)
        ctx.save_for_backward(g, q, k, v, bias, p, x, ds)
        return gradients

    @staticmethod
    def backward(ctx: Any, a: Tensor, b: Tensor, c: Tensor, e: Tensor | None) -> Any:
        *inputs, p, x, ds = ctx.saved_tensors
        if torch.is_grad_enabled():
            return (
                *stock_gradients(functools.partial(_formula, settings=ctx.settings), inputs, (a, b, c, e)),
                None,
                None,
            )
        (g, q, k, v, bias), s = inputs, ctx.settings.scale
        w = torch.baddbmm(p, a, k.mT, beta=0, alpha=s).baddbmm_(q, b.mT, alpha=s)
        if bias is not None and e is not None:
            w.view(ctx.settings.scores).add_(e)
        j = _of_softmax(w, p)
        sum_x, sum_w = ((p * each).sum(-1, keepdim=True) for each in (x, w))
        z = torch.bmm(g, c.mT).addcmul_(w, sum_x, value=-1).addcmul_(x, w.sub_(sum_w))
        z = _of_softmax(z, p)
        for_g = torch.bmm(p, c).baddbmm_(j, v)
        for_q = torch.baddbmm(q, ds, b, beta=0, alpha=s).baddbmm_(z, k, alpha=s)
        for_k = torch.baddbmm(k, ds.mT, a, beta=0, alpha=s).baddbmm_(z.mT, q, alpha=s)
        return for_g, for_q, for_k, torch.bmm(j.mT, g), _for_bias(z, bias, ctx.settings), None, None


def _backward(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, p: Tensor, settings: _Settings
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor | None], Tensor, Tensor]:
    """(dQ, dK, dV, dB), as printed above, with X and dS."""
    x = torch.bmm(g, v.mT)
    ds, s = _of_softmax(x, p), settings.scale
    dq, dk = torch.baddbmm(q, ds, k, beta=0, alpha=s), torch.baddbmm(k, ds.mT, q, beta=0, alpha=s)
    return (dq, dk, torch.bmm(p.mT, g), _for_bias(ds, bias, settings)), x, ds


def _formula(
    g: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, settings: _Settings
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The same in differentiable operations."""
    p = _softmax(at_least_single(q) @ at_least_single(k).mT * settings.scale, bias, settings).to(q.dtype)
    x = g @ v.mT
    ds = p * (x - (p * x).sum(-1, keepdim=True))
    return settings.scale * ds @ k, settings.scale * ds.mT @ q, p.mT @ g, _for_bias(ds, bias, settings)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Q K^T, in at least single precision."""
    if q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and torch.version.cuda:
        return torch.bmm(q, k.mT, out_dtype=torch.float32)
    return torch.bmm(at_least_single(q), at_least_single(k).mT)


def _softmax(scores: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor:
    """P; a row that is masked as a whole is zeros, as in stock."""
    if bias is None:
        return scores.softmax(-1)
    nothing = (bias == -math.inf).all(-1, keepdim=True)
    p = (scores.view(settings.scores) + bias.masked_fill(nothing, 0)).softmax(-1)
    return p.masked_fill(nothing, 0).view(scores.shape)


def _of_softmax(x: Tensor, p: Tensor) -> Tensor:
    """J(X), summed in at least single precision."""
    gradient: Tensor = aten._softmax_backward_data.default(x, p, -1, x.dtype)
    return gradient


def _for_bias(gradient: Tensor, bias: Tensor | None, settings: _Settings) -> Tensor | None:
    if bias is None or not bias.requires_grad:
        return None
    return gradient.view(settings.scores).sum_to_size(bias.shape).to(bias.dtype)


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

    Dropout, groups of queries and what is broadcast is left to the math kernel, as is what stock refuses.
    """
    *lead, length, width = query.shape
    sizes = key.shape[:-1], value.shape[:-1]
    if not lead or dropout_p or enable_gqa or query.numel() == 0 or {*sizes} != {(*lead, key.shape[-2])}:
        return NotImplemented
    if key.numel() == 0 or key.shape[-1] != width or (attn_mask is not None and is_causal):
        return NotImplemented
    dtype, scores = autocast_dtype(query.device), (*lead, length, key.shape[-2])
    if dtype is not None:
        query, key, value, attn_mask = (cast(each, dtype) for each in (query, key, value, attn_mask))
    bias = _bias(attn_mask, is_causal, query, scores)
    if bias is NotImplemented or not query.dtype == key.dtype == value.dtype:
        return NotImplemented
    settings = _Settings(1 / math.sqrt(width) if scale is None else scale, scores)
    with without_autocast(query.device):
        rows = (each.reshape(-1, *each.shape[-2:]) for each in (query, key, value))
        return Attention.apply(*rows, bias, settings).view(*lead, length, value.shape[-1])


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
