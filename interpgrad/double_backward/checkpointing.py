"""Non-reentrant activation checkpointing: what it recomputes must be what was recorded.

It recomputes in whichever backward pass comes, outside of any context of this package, and demands that what is saved
be the same. Its own `context_fn` is for whoever calls it, which is the model.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch


def saved_tensor_hooks() -> tuple[Callable[[Any], Any], Any] | None:
    """The hooks, (pack, unpack), that intercept saved tensors here, as those of checkpointing.

    Releases before 2.8 cannot tell; there torch raises its CheckpointError.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # torch >= 2.8
    hooks: tuple[Callable[[Any], Any], Any] | None = top and top(False)
    return hooks


def recompute_in(context: Callable[[], AbstractContextManager[Any]], pack: Callable[[Any], Any]) -> bool:
    """Where this hook is that of a checkpointed layer, have the layer recomputed in such a context; whether it is."""
    names = getattr(getattr(pack, "__code__", None), "co_freevars", ())
    cells = dict(zip(names, getattr(pack, "__closure__", None) or (), strict=False))
    frame = cells["frame"].cell_contents if "frame" in cells else None
    recompute = getattr(frame, "recompute_fn", None)
    if recompute is None:
        return False
    if not hasattr(recompute, "_interpgrad"):

        def in_context(*args: Any) -> Any:
            with context():
                return recompute(*args)

        in_context._interpgrad = True  # type: ignore[attr-defined]
        frame.recompute_fn = in_context  # type: ignore[union-attr]
    return True
