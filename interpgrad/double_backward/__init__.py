"""Convolutions and batch norms whose double backward is fast: same values, same gradients, of any order."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from interpgrad.double_backward import batch_norm, conv, hardsigmoid, rectifier, row_norm

_REPLACEMENTS = {
    **conv.REPLACEMENTS,
    **batch_norm.REPLACEMENTS,
    **row_norm.REPLACEMENTS,
    **rectifier.REPLACEMENTS,
    **hardsigmoid.REPLACEMENTS,
}


class fast_double_backward(TorchFunctionMode):  # noqa: N801  # type: ignore[misc]
    """Context manager: a forward pass inside it can be differentiated twice at little more than a native pass each.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    >>> x = torch.randn(2, 3, 8, 8, requires_grad=True)
    >>> with fast_double_backward():
    ...     y = model(x)
    >>> (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    >>> gradient.square().sum().backward()
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace what is worth replacing."""
        kwargs = kwargs or {}
        replacement = _REPLACEMENTS.get(func)
        if replacement is not None and torch.is_grad_enabled() and not _saved_tensor_hooks():
            result = replacement(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return func(*args, **kwargs)


def _saved_tensor_hooks() -> bool:
    """Whether saved tensors are intercepted here, as by (non-reentrant) checkpointing.

    It recomputes outside of any mode, with stock operations, so the forward pass must have used them too. Releases
    before 2.8 cannot tell; there torch raises its CheckpointError.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch >= 2.8
    return top is not None and top(False) is not None
