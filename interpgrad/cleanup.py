"""Changes that are taken back, also where Ctrl-C or a timer interrupts that."""

from __future__ import annotations

import threading
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


class OfAllThreads:
    """A context in which a state of the whole process is another.

    The first thread to come changes it and the last to leave takes it back: with a context each, threads would restore
    what they found of each other's.
    """

    def __init__(
        self, read: Callable[[], Any], write: Callable[[Any], object], inside: Callable[[Any], object]
    ) -> None:
        """`read` the state, None where there is none; `write` it; and what it is `inside`, a function of the former."""
        self._read, self._write, self._inside = read, write, inside
        self._lock = threading.Lock()
        self._users: set[object] = set()
        self._before: Any = None

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Enter on this thread."""
        user = object()

        def leave() -> None:
            with self._lock:
                self._users.discard(user)
                if not self._users and self._before is not None:
                    self._write(self._before)
                    self._before = None

        with finally_call(leave):
            with self._lock:
                self._before = self._read() if self._before is None else self._before
                self._users.add(user)
                if self._before is not None:
                    self._write(self._inside(self._before))
            yield
