"""Scaled dot-product attention on its one kernel with a double backward; the fused ones have none."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# Below these, layers may attend; the second calls the first where no function mode sees it.
FUNCTIONS = (F.scaled_dot_product_attention, F.multi_head_attention_forward)

_lock = threading.Lock()
_users = 0
_leave: Callable[[], Any]


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Select the differentiable kernel.

    The selection is the process's, so the first thread to come makes it and the last to leave takes it back: with
    an sdpa_kernel each, threads would restore what they found of each other's.
    """
    global _users, _leave
    with _lock:
        if _users == 0:
            _leave = _enter()
        _users += 1
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if _users == 0:
                _leave()


def _enter() -> Callable[[], Any]:
    """Enter an sdpa_kernel that may be left on another thread: it keeps a variable in the context it is entered in."""
    selection, context = sdpa_kernel(SDPBackend.MATH), contextvars.copy_context()
    context.run(selection.__enter__)
    return lambda: context.run(selection.__exit__, None, None, None)
