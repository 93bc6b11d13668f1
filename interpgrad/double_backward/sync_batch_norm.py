"""Batch norm across ranks that can be differentiated twice; torch's SyncBatchNorm cannot.

The statistics are sums over all ranks. A sum over ranks is its own derivative: what each rank's loss owes to a shared
sum is again summed over the ranks. Written in differentiable operations around that one collective, batch norm has
derivatives of every order, those of one process with the whole batch, on any device and backend.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function


class _SumOverRanks(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        """The sum of every rank's x."""
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        """The sum of every rank's gradient for it."""
        return _SumOverRanks.apply(g, ctx.group), None


@contextmanager
def differentiable_sync_batch_norm(model: nn.Module) -> Iterator[None]:
    """Inside, the SyncBatchNorm layers of the model run the operations below; their own forward otherwise.

    Subclasses that do more in their forward (timm's SyncBatchNormAct applies an activation) keep it, and are refused
    later, by the node they leave in the graph.
    """
    layers = [part for part in model.modules() if isinstance(part, nn.SyncBatchNorm) and _is_stock(part)]
    for layer in layers:
        vars(layer)["forward"] = functools.partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _is_stock(layer: nn.SyncBatchNorm) -> bool:
    return type(layer).forward is nn.SyncBatchNorm.forward and "forward" not in vars(layer)


def _forward(layer: nn.SyncBatchNorm, x: Tensor) -> Tensor:
    """As nn.SyncBatchNorm.forward: x (N, C, ...), of which every rank has its part."""
    group = layer.process_group or (dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)
    if not layer.training or group is None or dist.get_world_size(group) == 1:
        return type(layer).forward(layer, x)  # no synchronization: it calls F.batch_norm
    layer._check_input_dim(x)
    y, mean, variance, n = _normalize(x, layer.eps, group)
    if layer.track_running_stats:
        _update(layer, mean.detach(), variance.detach() * (n / (n - 1)))
    y = y if layer.weight is None else y * _channels(layer.weight, x)
    y = y if layer.bias is None else y + _channels(layer.bias, x)
    return y.to(x.dtype)


def _normalize(x: Tensor, eps: float, group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps), mean (C,), biased variance (C,) and the number of values in a channel."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    dims = [0, *range(2, x.dim())]
    n = x.new_tensor([x.numel() // x.shape[1]])
    *total, n = _SumOverRanks.apply(torch.cat([x.sum(dims), n]), group).split([x.shape[1], 1])
    n = n.detach()
    mean = total[0] / n
    centred = x - _channels(mean, x)
    variance = _SumOverRanks.apply(centred.square().sum(dims), group) / n
    return centred * _channels((variance + eps).rsqrt(), x), mean, variance, n


def _update(layer: nn.SyncBatchNorm, mean: Tensor, variance: Tensor) -> None:
    """The running statistics."""
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    momentum = 1 / layer.num_batches_tracked if layer.momentum is None else layer.momentum
    for running, new in ((layer.running_mean, mean), (layer.running_var, variance)):
        assert running is not None
        running.lerp_(new.to(running.dtype), momentum)


def _channels(value: Tensor, x: Tensor) -> Tensor:
    """(C,) as (1, C, 1, ...), to broadcast with x."""
    return value.view(1, -1, *[1] * (x.dim() - 2))
