"""Holds back the exceptions that signals raise, such as KeyboardInterrupt, for a few steps that belong together.

To block the signals in the thread is not enough: the kernel delivers a process's signal to any thread that does not
block it, such as a worker of a numerical library, and Python then runs the handler in its main thread nevertheless.
So for the time it is the handlers that are exchanged. A signal whose default action ends the process is left alone.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_USUAL = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def interruptions_held_back() -> Iterator[None]:
    """Have Python's handlers of the usual signals run afterwards. Only the main thread runs such handlers at all."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        arrived.append(number)

    handlers = {number: handler for number in _USUAL if callable(handler := signal.getsignal(number))}
    try:
        for number in handlers:
            signal.signal(number, note)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for missed in dict.fromkeys(arrived):
            signal.raise_signal(missed)
