"""Automatic mixed precision, on devices that may not know of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.amp import is_autocast_available


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype autocast casts to on this device, None where it is off."""
    enabled = is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else None


def at_least_single(tensor: Tensor) -> Tensor:
    """In single precision, if it was in half."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A context in which nothing is cast."""
    return torch.autocast(device.type, enabled=False) if is_autocast_available(device.type) else nullcontext()
