"""What is asked of the user's model everywhere: itself unwrapped, its evaluation mode, logits, classes to explain."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from interpgrad.cleanup import finally_call
from interpgrad.private import is_compiled_wrapper


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile's and the data-parallel wrappers.

    Only wrappers known to add nothing to the forward pass: a user's own `.module` may well be wrapped in a
    normalization that belongs to the model.
    """
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif is_compiled_wrapper(model):
            model = model.get_submodule("_orig_mod")
        else:
            return model


def logits_of(output: Any) -> Tensor:
    """The logits in what a model returned.

    Itself, its `.logits`, of a dict what is under "logits" or "out", the first of a tuple that is not a mere loss.
    """
    logits = getattr(output, "logits", output)
    if isinstance(logits, Mapping):
        logits = logits.get("logits", logits.get("out"))
    if isinstance(logits, (tuple, list)):
        logits = next((each for each in logits if not isinstance(each, Tensor) or each.dim()), None)
    if not isinstance(logits, Tensor) or not logits.dim():
        raise TypeError(
            'expected the model to return a tensor, an object with .logits, a dict with "logits" or "out", or a tuple '
            f"that begins with a tensor, got {type(output).__name__}: wrap the model in a module that returns the "
            "logits."
        )
    return logits


def class_logits(logits: Tensor) -> Tensor:
    """Logits (N, C, ...) of classes.

    One logit z for each image, (N,) or (N, 1, ...), counts as two, -z/2 and z/2: their softmax is the sigmoid of z.
    Others are returned as they are.
    """
    if logits.dim() == 1:
        logits = logits[:, None]
    return torch.cat([-logits / 2, logits / 2], 1) if logits.dim() > 1 and logits.shape[1] == 1 else logits


def call(model: nn.Module, x: Tensor, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> Any:
    """model(x, *args, **kwargs); the images are the first parameter of `forward` that kwargs do not name."""
    kwargs = kwargs or {}
    try:
        parameters = list(inspect.signature(unwrap(model).forward).parameters.values())
    except ValueError:  # TorchScript's, and builtins
        parameters = []
    if not parameters or (parameters[0].name not in kwargs and parameters[0].kind != inspect.Parameter.KEYWORD_ONLY):
        return model(x, *args, **kwargs)
    free = (each.name for each in parameters if each.name not in kwargs and each.kind not in _VARIADIC)
    return model(*args, **{next(free, "x"): x}, **kwargs)


_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_making_a_lock = threading.Lock()


def exclusive_use(model: nn.Module) -> AbstractContextManager[Any]:
    """Other threads of this package wait: they would change the model's modes, buffers and hooks, or put them back."""
    with _making_a_lock:
        return _locks.setdefault(unwrap(model), threading.RLock())


@contextmanager
def evaluation_mode(model: nn.Module, *, gradients: bool) -> Iterator[None]:
    """The model in evaluation mode, and gradients recorded or not; afterwards all modes as they were.

    Modules are told by `train`, which merges weights in some, or swaps graphs. Parents first: they tell their children.
    """
    with exclusive_use(model):
        modes, recorded = [(module, module.training) for module in model.modules()], torch.is_grad_enabled()
        trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

        def restore() -> None:
            torch.set_grad_enabled(recorded)
            try:
                for module, training in modes:
                    if module.training != training:
                        module.train(training)
            finally:
                for module, training in modes:  # where train() does not do as it is told
                    module.training = training
                for parameter, requires_grad in trained:
                    if parameter.requires_grad != requires_grad:
                        parameter.requires_grad_(requires_grad)

        with finally_call(restore):
            if any(training for _, training in modes):
                model.eval()
            torch.set_grad_enabled(gradients)
            yield


def classes_to_explain(target: Any, logits: Tensor) -> Tensor:
    """Class indices (N,): the target (one class for all, or one for each image), or None for the predicted ones."""
    if logits.dim() != 2:
        raise ValueError(f"expected logits of shape (N, classes), got {tuple(logits.shape)}: pass an image classifier.")
    samples, classes = logits.shape
    if target is None:
        return logits.detach().argmax(1)
    target = torch.as_tensor(target, device=logits.device)
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"expected target to hold class indices, got a tensor of {target.dtype}.")
    if target.shape == (samples, 1):
        target = target[:, 0]
    if target.shape not in ((), (samples,)):
        raise ValueError(
            f"expected target to be one class index or one for each of the {samples} images, got shape "
            f"{tuple(target.shape)}."
        )
    if target.numel() and (target.min() < 0 or target.max() >= classes):
        raise ValueError(
            f"expected class indices from 0 to {classes - 1}, got {int(target.min())} to {int(target.max())}."
        )
    indices: Tensor = target.long().expand(samples)
    return indices
