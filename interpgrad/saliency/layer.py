"""One layer of a model, whose output can be read or replaced during a forward pass."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from interpgrad.cleanup import removed_hooks
from interpgrad.forward import eager, is_compiled
from interpgrad.inputs import Inputs
from interpgrad.model import unwrap

Reshape = Callable[[Tensor], Tensor]


class Layer:
    """The layer of a model, given as the module or its dotted name.

    reshape turns its output into (N, K, h, w), where it is not: for instance a vision transformer's tokens,
    `lambda t: t[:, 1:].transpose(1, 2).unflatten(2, (14, 14))`. None is that, where it is plain from the output and
    the size of the images.
    """

    def __init__(self, model: nn.Module, layer: nn.Module | str, reshape: Reshape | None, size: torch.Size) -> None:
        self.model = unwrap(model)
        self.module, self.name = _find(self.model, layer)
        self.reshape = reshape
        self.size = size

    def run(self, inputs: Inputs, change: Callable[[Tensor], Tensor | None]) -> Tensor:
        """The logits of the inputs, with the layer's output replaced by what `change` makes of it (None: left)."""
        calls = 0

        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 1:
                raise RuntimeError(
                    f"expected layer {self.name!r} to be called once in a forward pass, it was called again: "
                    "choose a layer that is used once."
                )
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"expected layer {self.name!r} to return a tensor, got {type(output).__name__}: choose another one."
                )
            if output.dim() == 0 or len(output) != len(inputs):
                raise ValueError(
                    f"expected layer {self.name!r} to have one row for each of the {len(inputs)} images, got shape "
                    f"{tuple(output.shape)}: choose a layer outside of windows or patches."
                )
            return change(output)

        # What was compiled in place without this hook would not call it.
        with eager() if is_compiled(self.model) else nullcontext(), removed_hooks() as hooks:
            hooks.append(self.module.register_forward_hook(hook))
            logits = inputs.logits(self.model)
        if not calls:
            raise RuntimeError(
                f"expected layer {self.name!r} to be called in the forward pass, it was not: choose one that the "
                "model uses for this input (in evaluation mode)."
            )
        return logits

    def channels(self, output: Tensor) -> Tensor:
        """The layer's output as (N, K, h, w), in at least single precision."""
        self.reshape = self.reshape or self._usual_reshape(output)
        maps = output if self.reshape is None else self.reshape(output)
        if not isinstance(maps, Tensor) or maps.dim() != 2 + len(self.size) or len(maps) != len(output):
            received = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
            where = "" if self.reshape is None else " after reshape"
            raise ValueError(
                f"expected the output of layer {self.name!r} to be (N, K, h, w){where}, got {received}: choose a "
                "convolutional layer, or pass a callable `reshape` that makes (N, K, h, w) of the output."
            )
        return maps.to(torch.promote_types(maps.dtype, torch.float32))

    def _usual_reshape(self, output: Tensor) -> Reshape | None:
        """Of the tokens (N, T, K) of a vision transformer the grid; of (N, h, w, K) the channels first."""
        if len(self.size) != 2 or hasattr(self.model, "reroll"):  # Hiera's tokens are in an order of their own
            return None
        if output.dim() == 4 and is_grid(output.shape[1:3], self.size, padded=_is_swin(self.model)):
            if not is_grid(output.shape[2:], self.size):
                return lambda maps: maps.movedim(3, 1)
            if _is_swin(self.model):
                raise ValueError(
                    f"expected the output of layer {self.name!r} to say where its channels are, got "
                    f"{tuple(output.shape)}: pass reshape=lambda maps: maps.movedim(3, 1) if they come last."
                )
        if output.dim() == 3:
            for before in _tokens_before_the_grid(self.model):
                height = round(((output.shape[1] - before) * self.size[0] / self.size[1]) ** 0.5)
                grid = torch.Size((height, (output.shape[1] - before) // max(1, height)))
                if grid.numel() == output.shape[1] - before and is_grid(grid, self.size):
                    return lambda tokens: tokens[:, -grid.numel() :].transpose(1, 2).reshape(len(tokens), -1, *grid)
        return None

    def ablate(self, output: Tensor, channel: Tensor) -> Tensor:
        """The output of the layer with channel[i] set to 0 in row i, in place."""
        if self.reshape is None:
            output[torch.arange(len(output), device=output.device), channel] = 0
            return output
        # Which channel a value of the output belongs to: one-based, 0 for what reshape drops (a class token).
        with torch.enable_grad():
            values = torch.zeros_like(output[:1]).float().requires_grad_()
            maps = self.reshape(values)
            numbers = torch.arange(1, maps.shape[1] + 1, device=output.device, dtype=maps.dtype)
            numbers = numbers.view(1, -1, *[1] * (maps.dim() - 2)).expand_as(maps)
            (channel_of,) = torch.autograd.grad(maps, values, numbers)
        return output.masked_fill_(channel_of == (channel + 1).view(-1, *[1] * (output.dim() - 1)), 0)


def _is_swin(model: nn.Module) -> bool:
    """Whether layers of the model have channels last: timm says so, torchvision's has its name."""
    return getattr(model, "output_fmt", None) == "NHWC" or "swin_transformer" in type(model).__module__


def _tokens_before_the_grid(model: nn.Module) -> tuple[int, ...]:
    """How many there may be in a vision transformer of timm, torchvision or transformers; none in other models."""
    known = getattr(model, "num_prefix_tokens", None)  # timm's: class and distillation tokens, registers
    if known is not None:
        return (known, 0)
    is_transformer = type(model).__module__ == "torchvision.models.vision_transformer" or hasattr(
        getattr(model, "config", None), "patch_size"
    )
    return (1, 0) if is_transformer else ()


def is_grid(shape: torch.Size, size: torch.Size, *, padded: bool = False) -> bool:
    """Whether positions of this shape are images of this size, divided into equal squares, at most one of padding."""
    if not shape.numel() or shape[0] > size[0]:
        return False
    return abs(size[0] * shape[1] - size[1] * shape[0]) <= (max(size) if padded else 0)


def _find(model: nn.Module, layer: nn.Module | str) -> tuple[nn.Module, str]:
    modules = dict(model.named_modules())
    if isinstance(layer, str):
        if layer in modules and layer:
            return modules[layer], layer
        close = difflib.get_close_matches(layer, modules, n=3, cutoff=0.3)
        raise ValueError(
            f"expected the dotted name of a layer of the model, got {layer!r}: close to it are "
            f"{', '.join(map(repr, close)) or 'none'}; `model.named_modules()` lists all."
        )
    if not isinstance(layer, nn.Module):
        raise TypeError(f"expected layer to be a module of the model or its dotted name, got {type(layer).__name__}.")
    for name, module in modules.items():
        if module is layer or module is unwrap(layer):
            return module, name
    raise ValueError(f"expected a layer of the model, got a {type(layer).__name__} that is not part of it.")
