"""Read the threads of a process from /proc: the list of them, and a file of one of them.

A thread can exit between being listed and being read. That is ordinary and not an error: the files of such a thread
read as None, while a process that is gone raises.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass

from mthp.linux.process import Process, status_fields

_GONE = (errno.ENOENT, errno.ESRCH)
_READ_SIZE = 1 << 16


@dataclass(frozen=True, slots=True)
class Thread:
    """Fields of ``/proc/PID/task/TID/status`` (proc_pid_status(5)); every user may read them all.

    Attributes:
        state: one letter; D is uninterruptible sleep.
        tracer: TID of the thread that traces it, 0 if there is none.
        seccomp: 0 none, 1 strict, 2 a filter.
    """

    tid: int
    comm: str
    state: str
    tracer: int
    seccomp: int

    @classmethod
    def parse(cls, tid: int, text: bytes) -> Thread:
        """Read the text of a status file; a kernel without seccomp has no line for it."""
        fields = status_fields(text)
        return cls(
            tid=tid,
            comm=fields["Name"],
            state=fields["State"][:1],
            tracer=int(fields.get("TracerPid", "0")),
            seccomp=int(fields.get("Seccomp", "0")),
        )


def task_ids(process: Process) -> list[int]:
    """Return the threads of `process`, ascending."""
    directory = process.open("task")
    try:
        return sorted(int(name) for name in os.listdir(directory))  # noqa: PTH208 - of an open directory
    except OSError as error:
        process.fail(error, "its threads")
    finally:
        os.close(directory)


def thread_count(process: Process) -> int:
    """Return the number of threads of `process`, including those that are exiting, or dead and not reaped."""
    try:
        # Each thread has a directory, as "." and ".." have (proc_task_getattr, fs/proc/base.c).
        return os.stat(f"/proc/{process.pid}/task").st_nlink - 2  # noqa: PTH116 - a path object costs microseconds
    except OSError as error:
        process.fail(error, "its threads")


def read_task_file(process: Process, tid: int, name: str) -> bytes | None:
    """Return the text of ``/proc/PID/task/TID/<name>``; None if the thread is gone."""
    directory = process.open("task")
    try:
        fd = os.open(f"{tid}/{name}", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        try:
            return os.read(fd, _READ_SIZE)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno in _GONE and process.is_alive():
            return None
        process.fail(error, f"/proc/{process.pid}/task/{tid}/{name}")
    finally:
        os.close(directory)


def read_threads(process: Process) -> list[Thread]:
    """Return all threads that still exist, by ascending number."""
    texts = ((tid, read_task_file(process, tid, "status")) for tid in task_ids(process))
    return [Thread.parse(tid, text) for tid, text in texts if text]


def inner_tids(process: Process, tids: list[int]) -> list[int]:
    """Return the numbers of threads in the PID namespace that their process lives in (NSpid, proc_pid_status(5))."""
    if len(_namespace_tids(process.read("status"), process.pid)) == 1:
        # This process lives in the same namespace.
        return tids
    return [_namespace_tids(read_task_file(process, tid, "status") or b"", tid)[-1] for tid in tids]


def _namespace_tids(status: bytes, tid: int) -> list[int]:
    return [int(word) for word in status_fields(status).get("NSpid", "").split()] or [tid]
