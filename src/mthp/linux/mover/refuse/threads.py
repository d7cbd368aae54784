"""Refusals by thread: one that must not run injected code."""

from __future__ import annotations

from mthp.linux.mover.taskfiles import Thread
from mthp.linux.mover.tracee import CannotStopError
from mthp.linux.process import Process


def check_threads(process: Process, threads: list[Thread]) -> dict[int, Thread]:
    """Return `threads` by TID; raise CannotStopError if one must not run injected code."""
    for thread in threads:
        check_thread(process, thread)
    return {thread.tid: thread for thread in threads}


def check_thread(process: Process, thread: Thread) -> None:
    """Do nothing if `thread` may run injected code.

    Raises:
        CannotStopError: it filters system calls, which may kill it for the mover's, or is a thread of io_uring.
    """
    if thread.seccomp:
        raise CannotStopError(
            f"process {process.label}: thread {thread.tid} filters its system calls (seccomp)",
            help="a filter may kill the process for the mover's calls",
        )
    if thread.comm.startswith("iou-"):
        raise CannotStopError(f"process {process.label} uses io_uring ({thread.comm}), which may hold its pages")
