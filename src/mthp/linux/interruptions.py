"""Hold back the exceptions that signals raise, such as KeyboardInterrupt, for a few steps that belong together.

Ctrl-Z raises nothing, but stops the process at any instruction: a target with stopped threads would stay stopped until
the user types ``fg``, and a switch would stay changed. So it waits, too, and longer. (SIGSTOP cannot be held back, and
leaves both as they are until SIGCONT.)
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import FrameType

_USUAL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_Handler = Callable[[int, FrameType | None], object] | int | None


def interruptions_held_back() -> AbstractContextManager[None]:
    """Delay Python's handlers of the usual signals. Only the main thread runs such handlers at all."""
    if threading.current_thread() is not threading.main_thread():
        return contextlib.nullcontext()
    # A signal with a default action that ends the process keeps it: only handlers raise.
    return _held_back({number: handler for number in _USUAL if callable(handler := signal.getsignal(number))})


@contextlib.contextmanager
def suspension_held_back() -> Iterator[None]:
    """Delay the stop by Ctrl-Z (SIGTSTP), if this is the main thread.

    Meanwhile a background process that writes to its terminal is not stopped either (SIGTTOU).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    to_write = signal.getsignal(signal.SIGTTOU)
    ctrl_z = signal.getsignal(signal.SIGTSTP)
    with _held_back({} if ctrl_z in (signal.SIG_IGN, None) else {signal.SIGTSTP: ctrl_z}):
        try:
            if to_write is not None:
                signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            yield
        finally:
            if to_write is not None:
                signal.signal(signal.SIGTTOU, to_write)


@contextlib.contextmanager
def _held_back(handlers: Mapping[int, _Handler]) -> Iterator[None]:
    """Record signals, and raise them once their `handlers` are back."""
    arrived: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    try:
        for number in handlers:
            # Blocking is not enough: the kernel delivers a process's signal to any thread that does not block it, such
            # as a worker of a numerical library, and Python then runs the handler in its main thread nevertheless.
            signal.signal(number, note)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for missed in dict.fromkeys(arrived):
            signal.raise_signal(missed)
