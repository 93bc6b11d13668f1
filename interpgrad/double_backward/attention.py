"""Scaled dot-product attention on its one kernel with a double backward; the fused ones have none."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch.nn.functional as F

from interpgrad import private
from interpgrad.cleanup import finally_call

# Below these, layers may attend; the second calls the first where no function mode sees it.
FUNCTIONS = (F.scaled_dot_product_attention, F.multi_head_attention_forward)

_lock = threading.Lock()
_users: set[object] = set()
_enabled: dict[str, bool] = {}  # the kernels, as the first of the users found them


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Select the differentiable kernel.

    The selection is the process's, so the first thread to come makes it and the last to leave takes it back: with
    an sdpa_kernel each, threads would restore what they found of each other's.
    """
    user = object()

    def leave() -> None:
        with _lock:
            _users.discard(user)
            if not _users:
                private.enable_attention(_enabled)

    with finally_call(leave):
        with _lock:
            if not _users:
                _enabled.update(private.enabled_attention())
            _users.add(user)
            private.enable_attention({name: name == "math" for name in _enabled})
        yield
