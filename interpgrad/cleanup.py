"""Changes that are taken back, also where Ctrl-C or a timer interrupts that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def finally_call(restore: Callable[[], object]) -> Iterator[None]:
    """Call `restore` on the way out, and again from its start if an exception ends it.

    Python runs a signal's handler, which may raise, between any two of its instructions.
    """
    try:
        yield
    finally:
        try:
            restore()
        except BaseException:
            restore()
            raise


@contextmanager
def removed_hooks() -> Iterator[list[Any]]:
    """A list for the handles of hooks, which are removed on the way out."""
    handles: list[Any] = []
    with finally_call(lambda: [handle.remove() for handle in handles]):
        yield handles
