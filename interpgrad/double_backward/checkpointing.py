"""Non-reentrant activation checkpointing: what it recomputes must be what was recorded.

It recomputes in whichever backward pass comes, outside of any context of this package, and demands that what is saved
be the same. Its own `context_fn` is for whoever calls it, which is the model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from interpgrad.private import frame_of_checkpoint


def recompute_in(context: Callable[[], AbstractContextManager[Any]], pack: Callable[[Any], Any]) -> bool:
    """Where this hook is that of a checkpointed layer, have the layer recomputed in such a context; whether it is."""
    frame = frame_of_checkpoint(pack)
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
