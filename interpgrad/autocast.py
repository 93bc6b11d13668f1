"""Automatic mixed precision, on devices that may not know of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.amp import is_autocast_available

from interpgrad.cleanup import finally_call


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast casts to on this device, None where it is off."""
    enabled = is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def at_least_single(tensor: Tensor) -> Tensor:
    """In single precision, if it was in half."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """A context in which nothing is cast.

    NOTE. Not torch.autocast, which counts its contexts: interrupted, it would keep what it cast, and never renew it.
    """
    if autocast_dtype(device) is None:
        yield
        return
    with finally_call(lambda: torch.set_autocast_enabled(device.type, True)):
        torch.set_autocast_enabled(device.type, False)
        yield
