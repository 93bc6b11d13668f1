"""Layers whose double backward is fast, or exists at all: same values, same gradients, of any order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from interpgrad import private, signals
from interpgrad.double_backward import (
    attention,
    batch_norm,
    checkpointing,
    conv,
    hardsigmoid,
    on_views,
    pooling,
    rectifier,
    row_norm,
    smooth,
)

_REPLACEMENTS = {
    **conv.REPLACEMENTS,
    **batch_norm.REPLACEMENTS,
    **row_norm.REPLACEMENTS,
    **pooling.REPLACEMENTS,
    **rectifier.REPLACEMENTS,
    **smooth.REPLACEMENTS,
    **hardsigmoid.REPLACEMENTS,
    **on_views.REPLACEMENTS,
}
_CONCERNED = {*_REPLACEMENTS, *attention.FUNCTIONS}


class fast_double_backward(TorchFunctionMode):  # noqa: N801  # type: ignore[misc]
    """Context manager: a forward pass inside it can be differentiated twice at little more than a native pass each.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    >>> x = torch.randn(2, 3, 8, 8, requires_grad=True)
    >>> with fast_double_backward():
    ...     y = model(x)
    >>> (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    >>> gradient.square().sum().backward()
    """

    def __init__(self) -> None:
        super().__init__()
        # The context for what is checkpointed inside.
        self.recompute_in: Callable[[], AbstractContextManager[Any]] = fast_double_backward
        self.recomputes = False  # whether anything is
        self._selections: list[AbstractContextManager[None]] = []

    @signals.uninterrupted
    def __enter__(self) -> Any:
        """Select the attention kernel that can be differentiated twice, and begin to replace."""
        selection = attention.differentiable_attention()
        selection.__enter__()
        self._selections.append(selection)
        signals.enter()
        return super().__enter__()  # type: ignore[no-untyped-call]

    @signals.uninterrupted
    def __exit__(self, *raised: Any) -> None:
        """Leave both as they were."""
        # Torch may have lost the mode, where its own handling of it was interrupted.
        if any(isinstance(mode, fast_double_backward) for mode in private.function_modes()):
            super().__exit__(*raised)  # type: ignore[no-untyped-call]
        self._selections.pop().__exit__(None, None, None)
        signals.leave()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace what is worth replacing."""
        signals.point()
        kwargs = kwargs or {}
        if func in _CONCERNED and torch.is_grad_enabled():
            if checkpointing.recompute_in(self.recompute_in):
                self.recomputes = True
            if func in _REPLACEMENTS and _is_plain(args[0] if args else kwargs.get("input")):
                result = _REPLACEMENTS[func](*args, **kwargs)
                if result is not NotImplemented:
                    return result
        return func(*args, **kwargs)


def _is_plain(x: Any) -> bool:
    """Real numbers in one block of memory, and no transform of torch.func under way: what the replacements are for."""
    usual = isinstance(x, torch.Tensor) and not (x.is_complex() or x.is_nested)
    return usual and not private.under_a_transform()
