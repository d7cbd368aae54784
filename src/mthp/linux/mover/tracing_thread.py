"""A thread for one window: a tracer is a thread, whose end releases everything that it still traces."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar, cast

_PR_SET_TIMERSLACK = 29
_T = TypeVar("_T")
_libc = ctypes.CDLL(None, use_errno=True)


def in_tracing_thread(deed: Callable[[], _T]) -> _T:
    """Run `deed` in a new thread, and return its result.

    A tracer is a thread. The end of this one lets go of whatever is still traced, also of threads that never stopped
    and so could not be detached. And signal handlers of Python, KeyboardInterrupt among them, run in the main thread
    only, so nothing interrupts a window: leaving the ``with`` block waits for its end. An interruption that comes while
    the thread is being started may leave it unknown to the executor, so it begins only when it is told to.
    """
    begin: SimpleQueue[bool] = SimpleQueue()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="mthp-mover", initializer=_hurry) as executor:
        try:
            future = executor.submit(lambda: deed() if begin.get() else None)
            begin.put(True)
            return cast("_T", future.result())
        except BaseException:
            begin.put(False)  # read by nobody if it was told to begin
            raise


def _hurry() -> None:
    """Have this thread, which ends soon, run before the target's threads and sleep no longer than it asks for."""
    _libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(1), 0, 0, 0)
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
