"""C targets for the tests of the mover: compiled on first use, driven through a shared file."""

from __future__ import annotations

import contextlib
import errno
import functools
import mmap
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pytest

from mthp.errors import MthpError
from mthp.linux.live import open_live
from mthp.linux.mover.session import MoverSession
from mthp.linux.mover.steps import Observer
from mthp.linux.mover.tracee import CannotStopError
from mthp.linux.process import Process
from mthp.linux.sysfs import ThpSysfs
from mthp.results import BlockOutcome
from targets import threads_of
from thp_switches import size_name
from waiting import FACTOR, PATIENCE, wait_for

Observe = Callable[[Observer | None], None]
"""The fixture ``observe``: has its argument called after every step of the mover."""

GEOMETRY = ThpSysfs().geometry()
"""Of this machine."""

ORDER = 4
BLOCK = GEOMETRY.size_of(ORDER)
"""The order that tests move by default, which every machine has."""

BLOCK_SIZE = size_name(ORDER)

SOURCES = Path(__file__).parent / "programs"
MAX_THREADS = 128

LEFT_SECONDS = 3.0 * FACTOR
"""How long something of ours may be in a target after our death."""

_WORDS = (
    *("stop", "ready", "base", "size", "finished", "final_errors"),
    *("realtime_signals", "alarms", "forks", "spawned", "other_errors", "longest_gap_ns"),
)


@functools.cache
def compiled(name: str) -> Path:
    """The program of ``programs/<name>.c``, or the library if the name ends in ``.so``; skips where it cannot be had.

    Machines without a compiler may have all of them in the directory that MTHP_TEST_PROGRAMS names.
    """
    brought = Path(os.environ.get("MTHP_TEST_PROGRAMS", "/nonexistent")) / name
    if brought.exists():
        return brought
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("needs a C compiler (cc)")
    program = Path(_programs().name) / name
    subprocess.run(compilation(compiler, name, program), check=True)
    return program


def compilation(compiler: str, name: str, program: Path) -> list[str]:
    """Return the command that compiles one of `SOURCES`; ``NAME.so`` is the library of ``NAME.c``."""
    kind = ["-shared", "-fPIC"] if name.endswith(".so") else []
    source = SOURCES / f"{name.removesuffix('.so')}.c"
    return [compiler, "-O2", *kind, "-pthread", "-o", str(program), str(source)]


@functools.cache
def _programs() -> tempfile.TemporaryDirectory[str]:
    """Where they are; it goes with this process."""
    return tempfile.TemporaryDirectory(prefix="mthp-targets-", ignore_cleanup_errors=True)


class Controlled:
    """A program of `SOURCES` that is driven through a file of 64-bit words.

    A context manager; leaving it ends the process.

    Attributes:
        process, pid: the program that runs.
    """

    def __init__(self, directory: Path, name: str, *arguments: object, words: int = 512) -> None:
        path = directory / f"{name}-{time.monotonic_ns()}"
        path.write_bytes(bytes(8 * words))
        self.process = subprocess.Popen([compiled(name), path, *map(str, arguments)])
        self.pid = self.process.pid
        with path.open("r+b") as file:
            self.control = mmap.mmap(file.fileno(), 8 * words)

    def word(self, index: int) -> int:
        """Return one of the words."""
        return int(struct.unpack_from("=Q", self.control, 8 * index)[0])

    def put(self, index: int, value: int) -> None:
        """Change one of the words."""
        struct.pack_into("=Q", self.control, 8 * index, value)

    def ended(self) -> bool:
        """Return whether the process has ended."""
        return self.process.poll() is not None

    def await_ready(self, ready: Callable[[], object]) -> None:
        """Return once `ready` is true."""
        assert wait_for(lambda: ready() or self.ended()), "the target did not become ready"
        assert not self.ended(), f"the target ended: {self.process.returncode}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.control.close()


class Writers(Controlled):
    """A process of threads that check and rewrite their memory all the time (``programs/mover_writers.c``).

    Attributes:
        base, size: its memory: `megabytes` MiB with pages of 4 KiB, with larger pages as many pages, but at
            least one PMD range where 4 KiB make two.
    """

    def __init__(self, directory: Path, threads: int, megabytes: int, flags: str = "-") -> None:
        self.threads = threads
        whole_ranges = GEOMETRY.pmd_size >> 20 if megabytes >= 4 else 0
        megabytes = max(megabytes * GEOMETRY.page_size // 4096, whole_ranges)
        # An emulated processor is too slow for all threads, so the tested program has priority.
        flags += "n" if FACTOR > 1 else ""
        length = len(_WORDS) + 2 * MAX_THREADS
        super().__init__(directory, "mover_writers", threads, megabytes, flags, words=length)
        self.await_ready(lambda: self.get("ready"))
        self.base, self.size = self.get("base"), self.get("size")

    def get(self, name: str) -> int:
        """One of the numbers that the target keeps."""
        return self.word(_WORDS.index(name))

    def set(self, name: str, value: int) -> None:
        """Change one of these numbers."""
        self.put(_WORDS.index(name), value)

    def rounds(self) -> list[int]:
        """How far each thread has come."""
        return [self.word(len(_WORDS) + index) for index in range(self.threads)]

    @property
    def errors(self) -> int:
        """Wrong words that were seen so far, and other things that went wrong."""
        first = len(_WORDS) + MAX_THREADS
        return sum(self.word(first + index) for index in range(self.threads)) + self.get("other_errors")

    def progresses(self, seconds: float = PATIENCE) -> bool:
        """Return whether every thread gets on, before the process ends and within `seconds`."""
        before = self.rounds()

        def got_on() -> bool:
            return all(now > then for now, then in zip(self.rounds(), before, strict=True))

        wait_for(lambda: got_on() or self.process.poll() is not None, seconds)
        return got_on()

    def survives(self) -> bool:
        """Return whether it continues after its tracer was killed; False if it was killed as well."""
        assert self.progresses() or self.process.poll() is not None, f"stuck in state {self.state()}"
        assert self.process.poll() in (None, -signal.SIGKILL), f"it crashed: {self.process.returncode}"
        return self.process.poll() is None

    def finish(self) -> int:
        """Have it end and check all of its memory a last time: the number of all errors."""
        self.set("stop", 2)
        assert wait_for(lambda: self.process.poll() is not None), "the target does not end"
        assert self.get("finished") == 1, f"the target died: {self.process.returncode}"
        return self.errors + self.get("final_errors")

    def state(self) -> str:
        """State letter of the process."""
        text = Path(f"/proc/{self.pid}/stat").read_text()
        return text[text.rindex(")") + 2]

    def signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)


def mappings(pid: int) -> list[str]:
    """Ranges, permissions and names of all mappings, without the heap's end, which may grow."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return [" ".join(line.split()[:2] + line.split()[5:]) for line in lines]


WAITERS = (
    *("nanosleep", "poll", "select", "epoll_wait", "epoll_pwait", "futex", "read", "accept", "recv with timeout"),
    *("sigtimedwait", "semop", "io_getevents", "waitpid", "pause", "ppoll", "write"),
)
"""The calls in which the threads of ``programs/mover_waiters.c`` wait, by number."""


SYSCALLS = (
    *("nanosleep", "poll", "epoll_wait", "futex", "read", "accept", "recv with timeout", "sigtimedwait", "semop"),
    *("io_getevents", "waitpid", "pause"),
)
"""The calls of the threads of ``programs/mover_syscalls.c``, by number."""

SYSCALL_TIMEOUT = 0.02
"""Seconds after which calls that can time out do so, in every second turn."""

_MAX_TURNS = 512
_RECORD_WORDS = 4


class Syscalls(Controlled):
    """A process with a thread for each system call, which repeats it.

    Attributes:
        base, size: memory to move.
    """

    def __init__(self, directory: Path, turns: int) -> None:
        self._turns = turns
        length = 4 + len(SYSCALLS) * _MAX_TURNS * _RECORD_WORDS
        super().__init__(directory, "mover_syscalls", turns, words=length)
        self.await_ready(lambda: self.word(0))
        self.base, self.size = self.word(2), self.word(3)

    @property
    def finished(self) -> bool:
        """Whether all turns are over, or it died. It does not wait for the process, which may be traced just now."""
        return self.word(1) == len(SYSCALLS) or not Path(f"/proc/{self.pid}/stat").exists()

    def returned(self) -> dict[str, list[tuple[int, ...]]]:
        """Wait until it ends: value, errno, what else there was, and untimeliness, of each call in each turn.

        It must not be traced now.
        """
        assert wait_for(self.ended), "a system call does not come back"
        assert self.process.returncode == 0
        words = np.frombuffer(bytes(self.control), np.int64)[4:]
        records = words.reshape(len(SYSCALLS), _MAX_TURNS, _RECORD_WORDS)[:, : self._turns]
        return {name: [tuple(row) for row in part.tolist()] for name, part in zip(SYSCALLS, records, strict=True)}


class Waiters(Controlled):
    """A process with threads that wait in different system calls.

    Attributes:
        base, size: memory to move.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory, "mover_waiters")
        self.await_ready(lambda: self.word(1) and self._all_wait())
        self.base, self.size = self.word(2), self.word(3)

    def _all_wait(self) -> bool:
        """Return whether each thread sleeps in its system call."""
        asleep = [state == "S" for state in threads_of(self.pid).values()]
        return sum(asleep) == len(asleep) == len(WAITERS) + 1 and not self.not_waiting()

    def not_waiting(self) -> dict[str, int]:
        """Return the calls that have returned, with 2 if as they had to, else minus errno."""
        states = {name: self.word(4 + index) for index, name in enumerate(WAITERS)}
        errors = {name: self.word(36 + index) for index, name in enumerate(WAITERS)}
        return {name: 2 if state == 2 else -errors[name] for name, state in states.items() if state != 1}

    def interrupted(self) -> set[str]:
        """Return the calls that have returned with EINTR."""
        return {name for name, result in self.not_waiting().items() if result == -errno.EINTR}

    def release(self) -> dict[str, int]:
        """Cause the events that the threads wait for, and return :meth:`not_waiting` afterwards."""
        self.put(0, 1)
        wait_for(self.ended)
        return self.not_waiting()


@contextlib.contextmanager
def program(code: str, *arguments: str) -> Iterator[tuple[int, str]]:
    """Start a Python process with an open standard input, and return its PID and first line; skip if that is "none"."""
    command = [sys.executable, "-S", "-E", "-c", code, *arguments]
    with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline().strip()
            if said == "none":
                pytest.skip("this kernel or these rights do not have it")
            yield process.pid, said
        finally:
            process.kill()


_NUMBERS = {"x86_64": (206, 323, 273), "ppc64le": (227, 364, 300)}.get(os.uname().machine, (0, 282, 99))

PREAMBLE = f"""
import ctypes, mmap, os, struct, sys, threading, time
PAGE = mmap.PAGESIZE
IO_SETUP, USERFAULTFD, SET_ROBUST_LIST = {_NUMBERS}
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(1, 9)
libc.syscall.restype = ctypes.c_long
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
def call(number, *arguments):
    words = (a if isinstance(a, ctypes.Array) else ctypes.c_long(a) for a in arguments)
    answer = libc.syscall(ctypes.c_long(number), *words)
    if answer < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return answer
def memory(pages):
    return libc.mmap(None, pages * PAGE, 3, 0x22, -1, 0)
def thread(function, *arguments):
    threading.Thread(target=function, args=arguments, daemon=True).start()
def clone(flags):
    stack = memory(16) + 16 * PAGE
    return libc.clone(ctypes.cast(libc.pause, ctypes.c_void_p), ctypes.c_void_p(stack), flags, None)
def filter_calls():
    allow_all = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 1, ctypes.addressof(allow_all)))
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program)) == 0
"""
"""First lines of a target in Python: system calls by number, memory, threads, clone(2), a filter of system calls.

Numbers that are not named here are the same on every machine.
"""


READY = "\nprint('ready', flush=True)\ntime.sleep(600)\n"
"""Last lines of such a target."""

SQPOLL = """
setup = ctypes.create_string_buffer(120)
struct.pack_into("I", setup, 8, 2)
ring = libc.syscall(ctypes.c_long(425), ctypes.c_long(4), setup)
if ring < 0:
    print("none", flush=True)
time.sleep(0.1)
"""
"""A target with a thread of the kernel, which serves an io_uring."""

TRACER = """
assert libc.ptrace(0x4206, int(sys.argv[1]), None, None) == 0  # PTRACE_SEIZE
"""


def open_window(process: Process, **arguments: object) -> list[BlockOutcome]:
    """Move a block of some private memory of a process, and return the outcome."""
    size = GEOMETRY.size_of(2)
    for line in process.read("maps").decode().splitlines():
        span, permissions, _, _, inode, *name = line.split()
        start, end = (int(word, 16) for word in span.split("-"))
        block = -(-start // size) * size
        if permissions == "rw-p" and inode == "0" and not name and block + size <= end:
            with MoverSession(process, GEOMETRY, duty=1.0, **arguments) as session:  # type: ignore[arg-type]
                return session.move([(block, 2)])
    raise AssertionError("the target has no private memory")


def pages_by_order(pid: int | Literal["self"], start: int, size: int) -> Counter[int]:
    """Return how many pages between two addresses of a process lie in folios of each order."""
    with open_live(pid) as space:
        return Counter(space.read([(start, start + size)]).folio_order.tolist())


def is_refused(pid: int, reason: str, error: type[MthpError] = CannotStopError, **arguments: object) -> None:
    """Check that no window opens in a process, for this reason, and that it is as it was."""
    with Process(pid) as process:
        before = belongings(pid)
        with pytest.raises(error, match=reason):
            open_window(process, **arguments)
        assert belongings(pid) == before
        assert process.is_alive()


def belongings(pid: int) -> tuple[list[str], list[str], list[str]]:
    """Return the mappings, open files and threads of a process."""
    process = Path(f"/proc/{pid}")
    files = sorted(path.name for path in (process / "fd").iterdir())
    return mappings(pid), files, sorted(path.name for path in (process / "task").iterdir())
