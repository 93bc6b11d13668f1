"""Layers whose double backward is fast, or exists at all: same values, same gradients, of any order."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from interpgrad import private
from interpgrad.cleanup import finally_call
from interpgrad.double_backward import (
    attention,
    batch_norm,
    checkpointing,
    conv,
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
    **on_views.REPLACEMENTS,
    **attention.REPLACEMENTS,
}
_CONCERNED = {*_REPLACEMENTS, *attention.FUNCTIONS}
_PROBE = torch.empty(0, device="cpu")


class fast_double_backward:  # noqa: N801
    """Context manager: a forward pass inside it can be differentiated twice at little more than a native pass each.

    A first derivative whose own is zero everywhere, as of rectifiers alone, may not require a gradient, though stock's
    does. While torch.compile traces, nothing is replaced.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    >>> x = torch.randn(2, 3, 8, 8, requires_grad=True)
    >>> with fast_double_backward():
    ...     y = model(x)
    >>> (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    >>> gradient.square().sum().backward()
    """

    def __init__(self) -> None:
        # The context for what is checkpointed inside.
        self.recompute_in: Callable[[], AbstractContextManager[Any]] = fast_double_backward
        self.recomputes = False  # whether anything is
        self.higher_order: str | None = None  # the last operator that takes functions, if one was called
        self._contexts: list[AbstractContextManager[None]] = []

    def __enter__(self) -> Any:
        """Select the attention kernel that can be differentiated twice, and begin to replace."""
        if torch.compiler.is_compiling():
            return self
        self._contexts.append(_entered(_Mode(self)))
        self._contexts[-1].__enter__()
        return self

    def __exit__(self, *raised: Any) -> bool | None:
        """Leave both as they were."""
        return self._contexts.pop().__exit__(*raised) if self._contexts else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace what is worth replacing."""
        kwargs = kwargs or {}
        if func in _CONCERNED and torch.is_grad_enabled():
            if checkpointing.recompute_in(self.recompute_in):
                self.recomputes = True
            if func in _REPLACEMENTS and _is_plain(args[0] if args else kwargs.get("input", kwargs.get("query"))):
                result = _REPLACEMENTS[func](*args, **kwargs)
                if result is not NotImplemented:
                    return result
        elif private.is_higher_order(func):
            self.higher_order = func.name()
        return func(*args, **kwargs)


class _Mode(TorchFunctionMode):
    """What is on torch's stack.

    NOTE. It does not hold the context that the user holds. So that is freed where Ctrl-C comes before its `__exit__`,
    and what it has entered is left.
    """

    def __init__(self, context: fast_double_backward) -> None:
        super().__init__()
        self._context = weakref.ref(context)

    def leave(self) -> None:
        if _is_entered():
            self.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.compiler.is_compiling():  # what a compiler makes of a Function is another function
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.dim and args[0] is _PROBE:
            return -1
        context = self._context()
        return context.__torch_function__(func, types, args, kwargs) if context else func(*args, **(kwargs or {}))


@contextmanager
def _entered(mode: _Mode) -> Iterator[None]:
    with attention.differentiable_attention(), finally_call(mode.leave):
        try:
            mode.__enter__()  # type: ignore[no-untyped-call]
            yield
        except BaseException as error:
            # NOTE. Ctrl-C may come while torch has taken the mode off its stack, to put it back when a generator is
            # closed. The traceback holds that generator: cleared, the mode is back, and is taken off for good.
            if not _is_entered():
                traceback.clear_frames(error.__traceback__)
            raise


def _is_entered() -> bool:
    """Whether such a mode is on torch's stack, on this thread."""
    return torch.Tensor.dim(_PROBE) < 0


def _is_plain(x: Any) -> bool:
    """Real numbers in one block of memory, in eager mode without dual numbers: what the replacements are for."""
    usual = isinstance(x, torch.Tensor) and not (x.is_complex() or x.is_nested or x.is_quantized or x.is_mkldnn)
    return usual and not (private.under_a_transform() or private.has_dual_numbers() or private.is_traced())
