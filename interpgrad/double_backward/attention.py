"""Scaled dot-product attention on its one kernel with a double backward; the fused ones have none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F

# Below these, layers may attend; the second calls the first where no function mode sees it.
FUNCTIONS = (F.scaled_dot_product_attention, F.multi_head_attention_forward)

_KERNELS = ("flash", "mem_efficient", "cudnn", "math")
_lock = threading.Lock()
_users = 0
_enabled_before: dict[str, bool] = {}


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Select the differentiable kernel.

    The selection is the process's, so the first thread to come makes it and the last to leave takes it back: with
    torch.nn.attention.sdpa_kernel, threads would restore what they found of each other's.
    """
    global _users
    with _lock:
        if _users == 0:
            for kernel in _KERNELS:
                _enabled_before[kernel] = getattr(torch.backends.cuda, f"{kernel}_sdp_enabled")()
                _enable(kernel, kernel == "math")
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                for kernel, enabled in _enabled_before.items():
                    _enable(kernel, enabled)


def _enable(kernel: str, enabled: bool) -> None:
    getattr(torch.backends.cuda, f"enable_{kernel}_sdp")(enabled)


def recompute_alike(pack_hook: Callable[[Any], Any]) -> None:
    """Where this hook is that of a checkpointed layer, have it recomputed on the differentiable kernel too.

    Checkpointing recomputes in whichever backward pass comes, outside of any context of this package, and demands that
    what is saved be the same. Its own `context_fn` is for whoever calls it, which is the model.
    """
    names = getattr(getattr(pack_hook, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, getattr(pack_hook, "__closure__", None) or (), strict=False))
    frame = cells["frame"].cell_contents if "frame" in cells else None
    recompute = getattr(frame, "recompute_fn", None)
    if recompute is not None and not hasattr(recompute, "__wrapped__"):  # not yet wrapped below
        frame.recompute_fn = differentiable_attention()(recompute)  # type: ignore[union-attr]
