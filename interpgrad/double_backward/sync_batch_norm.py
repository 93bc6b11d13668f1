"""Batch norm across ranks, whose statistics can be held constant, or differentiated twice; torch's has neither.

Constant: torch's own forward and backward pass, but for inner passes, where it is a scaling that needs no collective.

Differentiable: the statistics are sums over all ranks. A sum over ranks is its own derivative: what each rank's loss
owes to a shared sum is again summed over the ranks. Written in differentiable operations around that one collective,
batch norm has derivatives of every order, those of one process with the whole batch, on any device and backend; in
passes with frozen statistics the collective's node is not reached.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules import _functions as torch_functions

from interpgrad.autocast import at_least_single
from interpgrad.cleanup import finally_call
from interpgrad.double_backward.batch_norm import channels, constant_backward, scaling
from interpgrad.double_backward.engine import Function, in_frozen_pass, needed


class _SumOverRanks(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        """The sum of every rank's x."""
        ctx.group = group
        ctx.set_materialize_grads(False)
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> tuple[Tensor | None, None]:
        """The sum of every rank's gradient for it; none in a pass with frozen statistics."""
        return None if g is None else _SumOverRanks.apply(g, ctx.group), None


class Standardized(Function):
    """(x - mean) s: the sums over the batch that its backward pass needs are the statistics' own gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
        ctx.save_for_backward(x, mean, invstd)
        return (x - channels(mean, x)) * channels(invstd, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, mean, invstd = ctx.saved_tensors
        if in_frozen_pass():
            return scaling(g, None, invstd), None, None
        dims = [0, *range(2, x.dim())]
        return g * channels(invstd, x), -g.sum(dims) * invstd, (g * (x - channels(mean, x))).sum(dims)


class SyncBatchNorm(Function, torch_functions.SyncBatchNorm):
    """torch's own, on its kernels."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """Torch's own, but in passes with frozen statistics."""
        if not in_frozen_pass():
            gradients: tuple[Tensor | None, ...] = torch_functions.SyncBatchNorm.backward(ctx, g)  # type: ignore[no-untyped-call]
            return gradients
        x, weight, mean, invstd, _ = ctx.saved_tensors
        mask = needed(ctx, (True, weight is not None, weight is not None))
        return *constant_backward(g, x, weight, mean, invstd, mask), *[None] * 6


@contextmanager
def replaced_sync_batch_norm(model: nn.Module, *, differentiable: bool) -> Iterator[None]:
    """Inside, the SyncBatchNorm layers of the model run one of the two above; their own forward otherwise.

    Contexts may be nested, and one that is differentiable serves both. Subclasses that do more in their forward (timm's
    SyncBatchNormAct applies an activation) keep it, and are refused later, by the node they leave in the graph.
    """
    layers = [part for part in model.modules() if isinstance(part, nn.SyncBatchNorm) and _is_stock(part)]
    replaced = [(layer, vars(layer).get("forward")) for layer in layers]

    def restore() -> None:
        for layer, outer in replaced:
            vars(layer).pop("forward", None)
            if outer is not None:
                vars(layer)["forward"] = outer

    with finally_call(restore):
        for layer, outer in replaced:
            if outer is None or differentiable:
                vars(layer)["forward"] = functools.partial(_forward, layer, differentiable)
        yield


def _is_stock(layer: nn.SyncBatchNorm) -> bool:
    own = vars(layer).get("forward")
    return type(layer).forward is nn.SyncBatchNorm.forward and (own is None or getattr(own, "func", None) is _forward)


def _forward(layer: nn.SyncBatchNorm, differentiable: bool, x: Tensor) -> Tensor:
    """As nn.SyncBatchNorm.forward: x (N, C, ...), of which every rank has its part."""
    group = layer.process_group or (dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)
    if not layer.training or group is None or dist.get_world_size(group) == 1:
        return type(layer).forward(layer, x)  # no synchronization: it calls F.batch_norm
    layer._check_input_dim(x)
    if differentiable or not _has_kernels(x):
        return _differentiable(layer, x, group)
    momentum, running_mean, running_var = 0.0, None, None
    if layer.track_running_stats:
        momentum, running_mean, running_var = _momentum(layer), layer.running_mean, layer.running_var
    world = dist.get_world_size(group)
    y: Tensor = SyncBatchNorm.apply(
        x, layer.weight, layer.bias, running_mean, running_var, layer.eps, momentum, group, world
    )
    return y


def smallest(operations: Mapping[str, Sequence[Any]], value: Tensor) -> Tensor:
    """The smallest of the ranks' values, of those whose sums in a backward pass over these nodes are common."""
    names = (_SumOverRanks.operation, SyncBatchNorm.operation, "SyncBatchNorm")
    nodes = [node for name in names for node in operations.get(name, ())]
    groups = {node.group if hasattr(node, "group") else node.process_group for node in nodes}
    for group in groups:
        dist.all_reduce(value, dist.ReduceOp.MIN, group=group)
    return value


def _has_kernels(x: Tensor) -> bool:
    """Whether torch has any on its device."""
    return x.device.type != "cpu"


def _differentiable(layer: nn.SyncBatchNorm, x: Tensor, group: Any) -> Tensor:
    """On any device."""
    y, mean, variance, n = _normalize(x, layer.eps, group)
    if layer.track_running_stats:
        momentum = _momentum(layer)
        unbiased = variance.detach() * (n / (n - 1))
        for running, new in ((layer.running_mean, mean.detach()), (layer.running_var, unbiased)):
            assert running is not None
            running.lerp_(new.to(running.dtype), momentum)
    y = y if layer.weight is None else y * channels(layer.weight, x)
    y = y if layer.bias is None else y + channels(layer.bias, x)
    return y.to(x.dtype)


def _normalize(x: Tensor, eps: float, group: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps), mean (C,), biased variance (C,) and the number of values in a channel."""
    x = at_least_single(x)
    dims = [0, *range(2, x.dim())]
    n = x.new_full((1,), x.numel() // x.shape[1])
    *total, n = _SumOverRanks.apply(torch.cat([x.sum(dims), n]), group).split([x.shape[1], 1])
    n = n.detach()
    mean = total[0] / n
    variance = _SumOverRanks.apply((x - channels(mean, x)).square().sum(dims), group) / n
    return Standardized.apply(x, mean, (variance + eps).rsqrt()), mean, variance, n


def _momentum(layer: nn.SyncBatchNorm) -> float:
    """The weight of this batch in the running statistics, once it is counted."""
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    return 1 / layer.num_batches_tracked.item() if layer.momentum is None else layer.momentum
