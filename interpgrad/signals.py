"""Ctrl-C, timers and other signals, kept away from the moments in which something is half changed.

Python runs a signal's handler, which may raise, between any two instructions of the main thread: also on the way out of
a context, before its first line. So what changes the user's model runs with handlers that only take a note, and the
user's own are called when all is as it was. A second signal of the same kind is not kept waiting. (What another thread
throws in is beyond it.)
"""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_NAMES = ("SIGINT", "SIGTERM", "SIGALRM", "SIGUSR1", "SIGUSR2")
_KINDS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
_users = 0  # functions and contexts under way on the main thread
_own: dict[int, Any] = {}  # the user's handlers, while they are replaced
_noted: list[tuple[int, FrameType | None]] = []
# Where signals wait: in `critical` below, whose code is one for all functions that are decorated, and on the way in and
# out of any context, since torch takes its modes off their stack, and puts them back, in contexts of its own.
_CONTEXT = type(contextmanager(lambda: iter(()))())
_critical: set[Any] = {_CONTEXT.__enter__.__code__, _CONTEXT.__exit__.__code__}


def uninterrupted(function: Callable[P, T]) -> Callable[P, T]:
    """A decorator: signals that arrive while the function runs are handled when it has returned."""

    @functools.wraps(function)
    def critical(*args: P.args, **kwargs: P.kwargs) -> T:
        if threading.current_thread() is not threading.main_thread():
            return function(*args, **kwargs)
        enter()
        try:
            return function(*args, **kwargs)
        finally:
            leave()

    _critical.add(critical.__code__)  # type: ignore[attr-defined]
    return critical


class _Context(AbstractContextManager[T]):
    """Another context, whose way in and way out are not interrupted. What runs inside it may be."""

    def __init__(self, context: AbstractContextManager[T]) -> None:
        self._context = context

    @uninterrupted
    def __enter__(self) -> T:
        entered = self._context.__enter__()
        enter()
        return entered

    @uninterrupted
    def __exit__(self, *raised: Any) -> bool | None:
        try:
            return self._context.__exit__(*raised)
        finally:
            leave()


def uninterrupted_context(function: Callable[P, Iterator[T]]) -> Callable[P, AbstractContextManager[T]]:
    """As contextlib.contextmanager, for contexts whose way in and way out are not interrupted."""
    make = contextmanager(function)

    @functools.wraps(function)
    def helper(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[T]:
        return _Context(make(*args, **kwargs))

    return helper


def enter() -> None:
    """Begin to take notes, in a context's `__enter__`: so that its `__exit__` is not interrupted at its first line."""
    global _users
    if threading.current_thread() is not threading.main_thread():
        return
    if _users == 0:
        try:
            for kind in _KINDS:
                handler = signal.getsignal(kind)
                if callable(handler) and handler is not _handle:
                    _own[kind] = handler
                    signal.signal(kind, _handle)
        except BaseException:  # the handler of one that is not replaced yet
            _restore()
            raise
    _users += 1


def leave() -> None:
    """End it, and have done what was waiting."""
    global _users
    if threading.current_thread() is not threading.main_thread():
        return
    _users -= 1
    if _users == 0:
        _restore()
        _call_handlers()


def point() -> None:
    """Do what is waiting, if nothing is half changed here: between the operations inside a context."""
    if _noted and threading.current_thread() is threading.main_thread() and not _is_critical(sys._getframe()):
        _call_handlers()


def _call_handlers() -> None:
    while _noted:
        kind, frame = _noted.pop(0)
        handler = _own.get(kind, signal.getsignal(kind))
        if callable(handler):
            handler(kind, frame)


def _restore() -> None:
    raised: BaseException | None = None
    while _own:
        try:
            for kind in list(_own):
                if signal.getsignal(kind) is _handle:  # unless the user has set another one meanwhile
                    signal.signal(kind, _own[kind])
                del _own[kind]
        except BaseException as error:  # one that is restored already was called
            raised = error
    if raised:
        raise raised


def _handle(kind: int, frame: FrameType | None) -> None:
    """Take a note, or call the user's handler where nothing is half changed."""
    waiting = any(kind == other for other, _ in _noted)
    if not waiting and _is_critical(frame):
        _noted.append((kind, frame))
    else:
        _own[kind](kind, frame)


def _is_critical(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in _critical:
            return True
        frame = frame.f_back
    return False
