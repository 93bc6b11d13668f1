"""Batch statistics held constant in the input gradients, as inference holds them.

In training mode plain autograd differentiates batch norm through the statistics of the batch. The gradients compared
here do not: in the inner backward passes, and wherever their result is differentiated again, the statistics are
constants with the values of the forward pass. The user's own backward pass over the same graph is untouched.

The layers of `interpgrad.double_backward` know by themselves in which pass they run. Here is the rest: stock batch
norm, where no function mode saw it, and keeping apart two flows that meet on one graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from interpgrad import graph, private
from interpgrad.cleanup import removed_hooks
from interpgrad.double_backward.batch_norm import BatchNorm, scaling
from interpgrad.double_backward.engine import Function, frozen_pass, in_frozen_pass, needed
from interpgrad.double_backward.sync_batch_norm import Standardized, SyncBatchNorm

_STOCK = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm", "NativeBatchNormLegit", "BatchNormWithUpdate")
_RUNNING = ("NativeBatchNormLegitNoTraining", "BatchNormNoUpdate")
_OURS = (Standardized.operation, SyncBatchNorm.operation)  # and BatchNorm, where it is in training mode


class RecordedGraph(NamedTuple):
    """The recorded graph of a forward pass.

    Attributes:
        operations: its nodes.
        inner: the context of backward passes that are not the user's.
    """

    operations: graph.Operations
    inner: Callable[[], AbstractContextManager[None]]

    @contextmanager
    def frozen_pass(self, output: Tensor) -> Iterator[Tensor]:
        """A copy of `output`: in backward passes that begin there, batch statistics are constants."""
        with removed_hooks() as hooks, frozen_pass(output) as copy:
            for node in _of(self.operations, _STOCK):
                if _of_batch(node):
                    hooks.append(node.register_hook(_Scaled(node)))
            yield copy


class _Scaled:
    """The hook on a node of stock batch norm: its result, replaced by weight / sigma times the gradient from above."""

    def __init__(self, node: Any) -> None:
        self.node = node

    def __call__(self, gradients: tuple[Tensor | None, ...], outer: tuple[Tensor, ...]) -> Any:
        if gradients[0] is None or not in_frozen_pass():
            return None
        weight, invstd = self.node._saved_weight, self.node._saved_result2
        return scaling(outer[0], weight, invstd), *gradients[1:]


def batch_statistics(operations: graph.Operations) -> set[Node]:
    """The nodes whose ordinary backward pass runs through the statistics of the batch."""
    of_ours: Any = _of(operations, (BatchNorm.operation,))
    of_stock: Any = _of(operations, _STOCK)
    return {
        *_of(operations, _OURS),
        *(node for node in of_ours if node.freezable and node.kernel is not None),
        *(node for node in of_stock if _of_batch(node)),
    }


def _of_batch(node: Any) -> bool:
    """Of a stock node. Of one row, where inference has no running statistics, they are no batch's: of instance norm."""
    if not _in_training(node):
        return False
    return private.rows_of(node) > 1 or getattr(node, "_saved_running_mean", None) is not None


def _in_training(node: Any) -> bool:
    """Of stock nodes that are without the attribute `training` it is the name."""
    return getattr(node, "_saved_training", True)


def statistics(operations: graph.Operations) -> tuple[set[Node], set[Node], set[Node]]:
    """The nodes that normalize with the statistics of the batch, with running ones, and with each sample's own."""
    of_ours: Any = _of(operations, (BatchNorm.operation,))
    of_stock = _of(operations, _STOCK)
    batch = batch_statistics(operations)
    sample = {node for node in of_ours if not node.freezable and node.kernel is not None}
    sample |= {node for node in of_stock if _in_training(node)} - batch
    return batch, {*of_stock, *_of(operations, _RUNNING), *of_ours} - batch - sample, sample


def is_separate(gradient: Tensor, until: Tensor) -> bool:
    """Whether the gradient is differentiated in a pass of its own."""
    return _Separate.operation in graph.operations(gradient, until)


def _of(operations: graph.Operations, names: Iterable[str]) -> list[Node]:
    return [node for name in names for node in operations.get(name, ())]


class _Separate(Function):
    """The gradient, whose backward pass is one of its own, with frozen statistics.

    Inputs beside it are what it depends on, `attached` to the user's graph; `leaves` are the same values, where the
    gradient's graph ends.
    """

    @staticmethod
    def forward(
        ctx: Any, network: RecordedGraph, gradient: list[Tensor], leaves: Sequence[Tensor], *attached: Tensor
    ) -> Tensor:
        ctx.network, ctx.leaves, ctx.attached = network, leaves, attached
        ctx.save_for_backward(*gradient)  # in a list, or it would be an input itself
        return gradient[0].detach()

    @staticmethod
    def backward(ctx: Any, a: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        leaves, attached = ctx.leaves, ctx.attached
        mask = needed(ctx, (False, False, False, *[True] * len(leaves)))[3:]
        differentiable = torch.is_grad_enabled()
        of_a = a.detach().requires_grad_(a.requires_grad) if differentiable else a
        with ctx.network.inner(), ctx.network.frozen_pass(gradient) as output:
            found = _gradients(output, leaves, mask, of_a, create_graph=differentiable)
        if differentiable:
            found = [
                each if each is None else separately(ctx.network, each, (*leaves, of_a), (*attached, a))
                for each in found
            ]
        return None, None, None, *found


def separately(
    network: RecordedGraph, gradient: Tensor, leaves: Sequence[Tensor], attached: Sequence[Tensor]
) -> Tensor:
    """The same values, differentiated in a backward pass of its own.

    NOTE. With smooth activations or gates, delta's derivative flows back into the activations of the forward pass. From
    there it reaches the parameters, through batch norm. In this flow the statistics are constants. In that of the
    classification loss they are functions of the batch. Both flows meet on one graph, so one pass cannot be both.

    Args:
        network: the forward pass.
        gradient: a function of the leaves, with a graph.
        leaves: tensors in which it is differentiated there, and
        attached: their values as the user's graph has them.
    """
    if not gradient.requires_grad:
        return gradient
    result: Tensor = _Separate.apply(network, [gradient], leaves, *attached)
    return result


def _gradients(
    output: Tensor, leaves: Sequence[Tensor], mask: Sequence[bool], outer: Tensor, *, create_graph: bool
) -> list[Tensor | None]:
    """Gradients for the leaves, None where the mask is false."""
    asked = [leaf for leaf, want in zip(leaves, mask, strict=True) if want]
    if not asked:
        return [None] * len(leaves)
    found = iter(
        torch.autograd.grad(output, asked, outer, retain_graph=True, create_graph=create_graph, allow_unused=True)
    )
    return [next(found) if want else None for want in mask]
