"""Changes that are taken back, also where Ctrl-C or a timer interrupts that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
