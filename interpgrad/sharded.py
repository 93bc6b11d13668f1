"""FSDP2 frees the parameters of a layer after a backward pass through it. Here several passes come before the last."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from interpgrad import private


@contextmanager
def parameters_kept(module: nn.Module, *, afterwards: bool) -> Iterator[None]:
    """No backward pass inside frees parameters.

    Args:
        module: the network, sharded or not.
        afterwards: whether the parameters are needed afterwards too: by the user's own backward pass, which frees
            them. Otherwise they are freed here.
    """
    freeing = [group for group in private.parameter_groups(module) if group.reshard_after_backward]
    for group in freeing:
        group.reshard_after_backward = False
    try:
        yield
    finally:
        for group in freeing:
            group.reshard_after_backward = True
            if not afterwards:
                group.reshard()
