"""Two ways to a forward pass whose graph begins at the images: one of its own without a trace, or the user's."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


class Forward(NamedTuple):
    """A forward pass.

    Attributes:
        x: the images as the user passed them, (N, C, H, W).
        image: the same values at the root of the graph, in which gradients are taken.
        output: what the model returned.
    """

    x: Tensor
    image: Tensor
    output: Any

    @property
    def logits(self) -> Tensor:
        """The logits in the output: itself, its `.logits`, or the first of a tuple."""
        logits = getattr(self.output, "logits", self.output)
        if isinstance(logits, (tuple, list)) and logits:
            logits = logits[0]
        if not isinstance(logits, Tensor):
            raise TypeError(
                "expected the model to return a tensor, an object with .logits or a tuple that begins with a "
                f"tensor, got {type(self.output).__name__}: wrap the model in a module that returns the logits."
            )
        return logits


def forward_without_trace(
    model: nn.Module, x: Tensor, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> Forward:
    """A forward pass of its own.

    It reads and writes clones of the buffers, so batch norm does not count the batch twice, and the random
    state is restored, so the training loop draws the numbers it would have drawn.
    """
    module = _unwrap(model)
    _refuse_freed_parameters(module)
    image, model_input = _root_of_graph(x)
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with _random_state_restored(module, x), _differentiable_attention(), _eager(module):
        return Forward(x, image, functional_call(module, buffers, (model_input, *args), dict(kwargs or {})))


class Recorder:
    """The user's own forward pass: the last one inside `recording` on the thread that entered it."""

    def __init__(self) -> None:
        self.forward: Forward | None = None
        self._thread = threading.get_ident()
        self._x: Tensor | None = None
        self._image: Tensor | None = None

    @contextmanager
    def recording(self, model: nn.Module) -> Iterator[None]:
        """Record the calls of the model inside, and leave it as it was."""
        _refuse_freed_parameters(model)
        handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        try:
            with _differentiable_attention():
                yield
        finally:
            for handle in handles:
                handle.remove()
        if self.forward is None:
            raise RuntimeError(
                "expected a forward pass inside shared_forward(), got none: call the model that was given to the "
                "loss inside the with block, `with reg.shared_forward(): logits = model(x)`."
            )

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put a copy of the images, the first argument, on a graph."""
        if threading.get_ident() != self._thread:
            return None
        images = {name: value for name, value in kwargs.items() if _is_floating_point(value)}
        name = None if args else next(iter(images), None)
        self._x = check_images(args[0] if args else images.get(name or ""))
        self._image, model_input = _root_of_graph(self._x)
        return ((model_input, *args[1:]), kwargs) if args else (args, kwargs | {name: model_input})

    def _after(self, _: nn.Module, __: Any, output: Any) -> None:
        if threading.get_ident() == self._thread and self._x is not None and self._image is not None:
            self.forward = Forward(self._x, self._image, output)


def check_images(x: Any) -> Tensor:
    """Images in which gradients can be taken: x itself, or an error that says what is wrong with it."""
    if not _is_floating_point(x):
        received = f"a tensor of {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"expected x to be a floating point tensor, got {received}: convert the images, for instance x / 255."
        )
    if x.dim() == 0 or x.numel() == 0:
        raise ValueError(
            f"expected x to hold at least one image (N, C, H, W), got shape {tuple(x.shape)}: skip empty batches."
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "expected a mode in which gradients can be taken, got torch.inference_mode(): use torch.no_grad()."
        )
    images: Tensor = x
    return images


def check_batch(x: Any, y: Any) -> None:
    """Images as above, and as many targets."""
    x = check_images(x)
    if isinstance(y, Tensor) and (y.dim() == 0 or len(y) != len(x)):
        raise ValueError(
            f"expected one target for each of the {len(x)} images, got y of shape {tuple(y.shape)}: "
            "pass the x and y of the same batch."
        )


def _is_floating_point(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _root_of_graph(x: Tensor) -> tuple[Tensor, Tensor]:
    """The tensor to differentiate in, and a copy for the model, which may work on its input in place.

    Where x itself requires a gradient, both stay connected to it.
    """
    image = x.clone() if x.requires_grad else x.detach().requires_grad_()
    return image, image.clone()


def _unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and the data-parallel wrappers.

    Only wrappers known to add nothing to the forward pass: a user's own `.module` may well be wrapped in a
    normalization that belongs to the model.
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@contextmanager
def _random_state_restored(module: nn.Module, x: Tensor) -> Iterator[None]:
    """Restore the generators of the CPU and of every device that x and the module live on."""
    tensors = itertools.chain([x], module.parameters(), module.buffers())
    devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
    kind = next(iter(devices)).type if devices else "cuda"
    with torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind):
        yield


def _differentiable_attention() -> AbstractContextManager[None]:
    """Attention on its one kernel with a double backward; the fused ones have none."""
    return sdpa_kernel(SDPBackend.MATH)


def _eager(module: nn.Module) -> AbstractContextManager[None]:
    """Run submodules compiled in place (`module.compile()`) eagerly: their graphs have no double backward."""
    compiled = any(part._compiled_call_impl is not None or hasattr(part, "_orig_mod") for part in module.modules())
    if compiled and hasattr(torch.compiler, "set_stance"):
        eager: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
        return eager
    return nullcontext()


def _refuse_freed_parameters(module: nn.Module) -> None:
    """Refuse FSDP2 modules that free their parameters after a backward pass: two more are to come."""
    for part in module.modules():
        if hasattr(part, "set_reshard_after_backward"):
            state: Any = part._get_fsdp_state()  # type: ignore[operator]
            # A list of groups in newer releases.
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            if any(getattr(group, "reshard_after_backward", False) for group in groups):
                raise RuntimeError(
                    "expected parameters that stay after a backward pass, got an FSDP2 module that frees them "
                    f"({type(part).__name__}): call model.set_reshard_after_backward(False) once after fully_shard."
                )
