"""What the autograd engine knows and an autograd Function does not.

Which gradients somebody will use, and in whose backward pass it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from interpgrad import private


def tensors_of(*inputs: Any) -> tuple[bool, ...]:
    """For `needed`: which of a Function's leading inputs are tensors."""
    return tuple(isinstance(each, Tensor) for each in inputs)


def needed(ctx: Any, tensors: tuple[bool, ...]) -> list[bool]:
    """Which inputs' gradients the running backward pass will use.

    `ctx.needs_input_grad` is true for every weight, even while `torch.autograd.grad(loss, x)` asks for
    the images' gradient alone: an autograd Function that believes it computes all weight gradients in vain.
    PyTorch's own nodes ask the engine; so does this.
    """
    edges = iter(ctx.next_functions)
    nodes = [next(edges)[0] if is_tensor else None for is_tensor in tensors]
    return [node is not None and _will_run(node) for node in nodes]


def _will_run(node: Any) -> bool:
    return getattr(node, "consumers", 1) != 0 and private.will_run(node)


def stock_gradients(
    formula: Callable[..., Sequence[Tensor | None]], inputs: Sequence[Tensor | None], outer: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients for the inputs of a formula, by stock autograd: what a Function does not differentiate itself.

    Args:
        formula: of the inputs, in differentiable operations.
        inputs: tensors or None.
        outer: the gradients for what the formula returns, or None.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases: one input may be a function of another, and that path is not this node's to differentiate.
        aliases = [None if each is None else each.view_as(each) for each in inputs]
        outputs = formula(*aliases)
    pairs = zip(outputs, outer, strict=True)
    used = [(out, a.to(out.dtype)) for out, a in pairs if out is not None and a is not None and out.requires_grad]
    differentiable = [each for each in aliases if each is not None and each.requires_grad]
    if not used or not differentiable:
        return [None] * len(aliases)
    outputs, gradients = zip(*used, strict=True)
    found = iter(torch.autograd.grad(outputs, differentiable, gradients, create_graph=create_graph, allow_unused=True))
    return [next(found) if each is not None and each.requires_grad else None for each in aliases]


def apply_each(function: Any, g: Tensor, *others: Any) -> Any:
    """function.apply(g, *others), for each of the gradients g alone under `is_grads_batched=True`.

    Under its vmap a Function's result would lose its graph, so that a penalty on a Jacobian trained nothing.
    """
    if not private.is_batched(g):
        return function.apply(g, *others)
    results = [function.apply(each, *others) for each in private.each_of(g)]
    if isinstance(results[0], Tensor):
        return private.batched(results, g)
    return tuple(None if parts[0] is None else private.batched(parts, g) for parts in zip(*results, strict=True))


class Function(torch.autograd.Function):
    """An autograd Function whose backward pass torch.compile does not trace.

    NOTE. Inside a compiled training step the compiler follows `loss.backward()` into the backward passes. What they
    ask the engine, which pass this is and what it needs, would become constants.
    """

    operation = ""  # the native node that it stands for, such as "Relu", by which the graph is read; else its own name

    def __init_subclass__(cls) -> None:
        cls.operation = cls.operation or f"{cls.__module__}.{cls.__qualname__}"
        cls.backward = staticmethod(private.untraced(cls.backward))  # type: ignore[method-assign]


class Root(Function):
    """A copy of the images, whose gradient can be declared unwanted once it has been taken.

    The images must require a gradient for delta; afterwards the backward pass of the loss would compute it
    again at the first layer, for nobody. Once `consumers`, on its node, is 0, the layers of this package skip it.
    """

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        """The copy."""
        ctx.consumers = 1
        ctx.without_trace = False
        return images.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor | None) -> Tensor | None:
        """The identity."""
        return g


_frozen: set[int] = set()  # the numbers, unique in the process, of the backward passes under way with frozen statistics


@contextmanager
def frozen_pass(output: Tensor) -> Iterator[Tensor]:
    """A copy of `output`: in backward passes that begin there, while the context lasts, batch statistics are constants.

    NOTE. The pass is known by its number, which its first node takes down. A flag of the process would not do: the
    engine runs passes of others in between. Nor would one of the thread: on a GPU the engine has threads of its own.
    """
    numbers: list[int] = []
    try:
        with torch.enable_grad():
            copy = _Begin.apply(output, numbers)
        yield copy
    finally:
        _frozen.difference_update(numbers)


def in_frozen_pass() -> bool:
    """Whether the backward pass that this is called from is one with frozen statistics."""
    return bool(_frozen) and private.number_of_backward_pass() in _frozen


class _Begin(Function):
    """The identity."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, numbers: list[int]) -> Tensor:
        ctx.numbers = numbers
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        number = private.number_of_backward_pass()
        ctx.numbers.append(number)
        _frozen.add(number)
        return g, None
