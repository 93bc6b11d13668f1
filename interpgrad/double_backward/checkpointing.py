"""Non-reentrant activation checkpointing: what it recomputes must be what was recorded.

It recomputes in whichever backward pass comes, outside of any context of this package, and demands that what is saved
be the same. Its own `context_fn` is for whoever calls it, which is the model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from interpgrad.private import checkpoint_under_way


def recompute_in(context: Callable[[], AbstractContextManager[Any]]) -> bool:
    """Where a layer is being checkpointed, have it recomputed in such a context; whether one is."""
    frame = checkpoint_under_way()
    if frame is None:
        return False
    recompute = frame.recompute_fn
    if not hasattr(recompute, "_interpgrad"):

        def in_context(*args: Any) -> Any:
            with context():
                return recompute(*args)

        in_context._interpgrad = True  # type: ignore[attr-defined]
        frame.recompute_fn = in_context
    return True
