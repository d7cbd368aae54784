"""Target processes for live tests: puppets that map, touch and advise memory on command.

A :class:`Puppet` is a Python process that runs this file. It prints "ready" on its standard output, then executes one
JSON object a line from its standard input, and answers each with one. So a test can change the machine's switches
between two steps of its target, and knows which steps are done.

The puppet maps its memory with mmap(2) through ctypes, never by the heap, so its layout is exactly as requested.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

PROT_NONE, PROT_READ, PROT_WRITE = 0, 1, 2
MAP_SHARED, MAP_PRIVATE, MAP_FIXED, MAP_ANONYMOUS, MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
MADV_FREE, MADV_HUGEPAGE, MADV_NOHUGEPAGE = 8, 14, 15
MADV_PAGEOUT, MADV_COLLAPSE, MADV_GUARD_INSTALL = 21, 25, 102
PAGE_SIZE = os.sysconf("SC_PAGESIZE")


def _pmd_size() -> int:
    try:
        return int(Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size").read_text())
    except FileNotFoundError:
        return PAGE_SIZE * (PAGE_SIZE // 8)


PMD_SIZE = _pmd_size()
"""Memory that one PMD entry maps; without THP as on most machines, where tables are pages of 64-bit words."""

PMD_ORDER = (PMD_SIZE // PAGE_SIZE).bit_length() - 1


class Puppet:
    """A process that executes commands. A context manager: leaving it ends the process.

    Attributes:
        pid: its PID.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        if self._answer() != "ready":
            raise RuntimeError("the target did not become ready")

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the target ended")
        answer = json.loads(line)
        if isinstance(answer, dict):
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        return answer

    def tell(self, verb: str, *arguments: int) -> int:
        """Execute one of the functions in `_VERBS` there, and return its result.

        Raises:
            OSError: the system call failed.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([verb, *arguments]) + "\n")
        self._process.stdin.flush()
        return int(self._answer())

    def map(self, size: int, *, shared: bool = False, advice: int | None = None) -> int:
        """Map `size` bytes of anonymous memory, alone and aligned to a PMD range, and return the address."""
        address = self.tell("map", size, int(shared))
        if advice is not None:
            self.tell("madvise", address, size, advice)
        return address

    def write(self, address: int, pages: int = 1, step: int = 1) -> None:
        """Write to `pages` pages, every `step`-th one."""
        self.tell("write", address, pages, step)

    def stay_on_one_cpu(self) -> None:
        """Do not let it go from one CPU to another."""
        os.sched_setaffinity(self.pid, {min(os.sched_getaffinity(self.pid))})

    def drain_lru_batches(self) -> None:
        """Have enough pages put on the LRU that those before them have left their CPU's batch (mm/swap.c).

        It takes a process that stays on one CPU.
        """
        address = self.map(PMD_SIZE, advice=MADV_NOHUGEPAGE)
        self.write(address, 256)
        self.tell("madvise", address, PMD_SIZE, MADV_FREE)

    def died_with_its_tracer(self) -> bool:
        """Return whether the kernel killed it, as it may when a mover is killed that was making system calls in it."""
        try:
            self.tell("read", 0, 0, 1)
        except (RuntimeError, BrokenPipeError):
            return self._process.wait() == -signal.SIGKILL
        return False

    def kill(self) -> None:
        """End it at once, and wait until it is gone and its PID is free."""
        self._process.kill()
        self._process.wait()

    def kill_unwaited(self) -> None:
        """End it at once and leave the zombie."""
        self._process.kill()
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                # The last command, if it died before reading it.
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def threads_of(pid: int) -> dict[int, str]:
    """Return the threads of a process, and the state of each; one that ends just then is left out."""
    states = {}
    for tid in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            text = Path(f"/proc/{pid}/task/{tid}/stat").read_text()
            states[int(tid)] = text.rpartition(")")[2].split()[0]
    return states


STRICT = """
import ctypes
prctl = ctypes.CDLL(None).prctl
prctl(22, 1)
while True: pass
"""
"""A program in seccomp's strict mode, in which nearly every system call is the end: it makes none."""


def is_strict(pid: int) -> bool:
    """Return whether the condition holds now."""
    return "\nSeccomp:\t1\n" in Path(f"/proc/{pid}/status").read_text()


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = _libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long


def _checked(result: int) -> int:
    if result == -1 or result == ctypes.c_void_p(-1).value:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result


def _mmap(address: int, size: int, protection: int, flags: int) -> int:
    return _checked(_libc.mmap(address, size, protection, flags | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))


def map_aligned(size: int, shared: int) -> int:
    """Map `size` bytes at the beginning of a PMD range, with nothing mapped on either side that could merge with it."""
    reserved = _mmap(0, size + 3 * PMD_SIZE, PROT_NONE, MAP_PRIVATE)
    address = -(-reserved // PMD_SIZE) * PMD_SIZE + PMD_SIZE
    return _mmap(address, size, PROT_READ | PROT_WRITE, MAP_FIXED | (MAP_SHARED if shared else MAP_PRIVATE))


def write_pages(address: int, pages: int, step: int) -> int:
    """Write one byte to each of `pages` pages, `step` pages apart."""
    for page in range(pages):
        ctypes.memset(address + page * step * PAGE_SIZE, 1, 1)
    return 0


def read_pages(address: int, pages: int, step: int) -> int:
    """Read one byte of each of `pages` pages, `step` pages apart, and return the sum."""
    return sum(ctypes.string_at(address + page * step * PAGE_SIZE, 1)[0] for page in range(pages))


def fork() -> int:
    """Start a child that shares all memory and lives as long as this process, and return its PID."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(theirs)
        os.read(ours, 1)
        os._exit(0)
    os.close(ours)
    return pid


def madvise(address: int, size: int, advice: int) -> int:
    """madvise(2)."""
    return _checked(_libc.madvise(address, size, advice))


def mprotect(address: int, size: int, protection: int) -> int:
    """mprotect(2)."""
    return _checked(_libc.mprotect(address, size, protection))


def mlock(address: int, size: int, on_fault: int) -> int:
    """mlock2(2)."""
    return _checked(_libc.mlock2(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(on_fault)))


def pin(address: int, size: int) -> int:
    """Pin pages for as long as this process lives, by vmsplice(2) into a pipe that is never read."""
    read_end, write_end = os.pipe()
    vector = struct.pack("=QQ" if ctypes.sizeof(ctypes.c_void_p) == 8 else "=II", address, size)
    _checked(_libc.vmsplice(ctypes.c_int(write_end), vector, ctypes.c_ulong(1), ctypes.c_uint(0)))
    return read_end


def munmap(address: int, size: int) -> int:
    """munmap(2)."""
    return _checked(_libc.munmap(address, size))


def set_thp_disable(disable: int, flags: int = 0) -> int:
    """prctl(PR_SET_THP_DISABLE); flag 2 is PR_THP_DISABLE_EXCEPT_ADVISED (Linux 6.18)."""
    pr_set_thp_disable = 41
    return _checked(_libc.prctl(pr_set_thp_disable, disable, flags, 0, 0))


def start_thread() -> int:
    """Start a thread that sleeps, and return its TID."""
    thread = threading.Thread(target=threading.Event().wait, daemon=True)
    thread.start()
    assert thread.native_id is not None
    return thread.native_id


_VERBS: dict[str, Callable[..., int]] = {
    "map": map_aligned,
    "write": write_pages,
    "read": read_pages,
    "fork": fork,
    "madvise": madvise,
    "mprotect": mprotect,
    "munmap": munmap,
    "mlock": mlock,
    "pin": pin,
    "set_thp_disable": set_thp_disable,
    "start_thread": start_thread,
}


def _serve() -> None:
    print('"ready"', flush=True)
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        try:
            answer: int | dict[str, int] = _VERBS[verb](*arguments)
        except OSError as error:
            answer = {"errno": error.errno or 0}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve()
