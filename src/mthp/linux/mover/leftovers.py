"""Find and remove the remains of a killed mover in a process.

Older versions kept the stub's mapping and a userfaultfd in a target for a whole session, and left them there when they
were killed. This version has both only during a window. After its death the target unmaps everything by itself, unless
a thread may still be inside after two seconds.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mthp.errors import MthpError
from mthp.linux.mover import ptrace
from mthp.linux.mover.arch import MACHINES, by_name
from mthp.linux.mover.boot import CALLS, BootedThread
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.inject import Place, choose
from mthp.linux.mover.mapping import Mapping, read_mappings
from mthp.linux.mover.session import all_stopped, in_tracing_thread
from mthp.linux.mover.targetmemory import ProcessMemory
from mthp.linux.mover.tracee import CannotStopError
from mthp.linux.process import Process, list_pids
from mthp.linux.sysfs import ThpSysfs

_MARK = slice(16, 48)
"""The bytes of the stub's code that identify it; its first instruction jumps to another place in each version."""

_OLD_MARKS = (
    bytes.fromhex("b80e000000bf02000000488d7548ba0000000041ba080000000f058b4d0083f902"),
    bytes.fromhex("400080d261230191020080d2030180d2e81080d2010000d469ffdf883f090071"),
)
"""Marks of the versions that kept the stub for a session, on x86-64 and aarch64."""

_HEADER = struct.Struct("=4Q")
"""State, number of operations, address of the scratch memory, number of the userfaultfd; the same in all versions."""

_MOMENT = 0.005
"""Seconds between two checks of a thread that makes the calls."""

_USERFAULTFD = "anon_inode:[userfaultfd]"


@dataclass(frozen=True, slots=True)
class Leftover:
    """The remains of a mover in a process.

    Attributes:
        uffd: descriptor of the userfaultfd, -1 if there is none.
    """

    pid: int
    start: int
    end: int
    uffd: int


def find_leftovers(scratch_size: int) -> Iterator[Leftover]:
    """Yield the remains in every process that this one may read.

    Args:
        scratch_size: size of the mover's scratch memory in bytes: a PMD range.
    """
    marks = (*_OLD_MARKS, *(by_name(name).code[_MARK] for name in MACHINES))
    for pid in list_pids():
        if pid == os.getpid():
            continue
        try:
            with Process(pid) as process:
                yield from _leftovers_of(process, tuple(mark[:32] for mark in marks), scratch_size)
        except (MthpError, OSError):
            continue


def _leftovers_of(process: Process, marks: tuple[bytes, ...], scratch_size: int) -> Iterator[Leftover]:
    mappings = read_mappings(process)
    # Anonymous memory that may be executed and not written is rare, so hardly any process is looked into.
    code = [each for each in mappings if each.permissions == "r-xp" and not each.inode and not each.name]
    if not code:
        return
    with ProcessMemory(process) as memory:
        for mapping in code:
            if memory.read(mapping.start + _MARK.start, 32) not in marks:
                continue
            # The header lies behind the code in all versions, and the scratch memory behind the header.
            _, _, scratch, uffd = _HEADER.unpack(memory.read(mapping.end, _HEADER.size))
            end = scratch + scratch_size
            # The header could be any data: only a mapping of just this shape is the mover's.
            if _is_whole(mappings, mapping, end):
                yield Leftover(process.pid, mapping.start, end, uffd if _is_userfaultfd(process.pid, uffd) else -1)


def _is_whole(mappings: list[Mapping], code: Mapping, end: int) -> bool:
    """Return whether from `code` to `end` there is private memory without a gap and without a file."""
    at = code.end
    for mapping in mappings[mappings.index(code) + 1 :]:
        if mapping.start != at or mapping.permissions != "rw-p" or mapping.inode or mapping.end > end:
            break
        at = mapping.end
    return at == end


def _is_userfaultfd(pid: int, number: int) -> bool:
    try:
        return os.readlink(f"/proc/{pid}/fd/{number}") == _USERFAULTFD  # noqa: PTH115 - as text
    except OSError:
        return False


@dataclass(frozen=True, slots=True)
class Removed:
    """A leftover after the attempt to remove it.

    Attributes:
        reason: why it was not removed; "" if it was.
    """

    pid: int
    start: int
    uffd: int
    reason: str

    def __str__(self) -> str:
        also = f" and its userfaultfd {self.uffd}" if self.uffd >= 0 else ""
        did = f"not removed ({self.reason})" if self.reason else "removed"
        return f"{did}: a mover's code at {self.start:#x}{also} in process {self.pid}"


def remove_leftovers() -> list[Removed]:
    """Remove the remains of killed movers in all processes; return those found."""
    found = []
    # All are found before any is removed, because removing changes the processes that are searched.
    for leftover in list(find_leftovers(ThpSysfs().geometry().pmd_size)):
        reason = ""
        try:
            remove(leftover)
        except MthpError as error:
            reason = f"{error.message}: {error.help}" if error.help else error.message
        found.append(Removed(leftover.pid, leftover.start, leftover.uffd, reason))
    return found


def remove(leftover: Leftover) -> None:
    """Make a thread of the process unmap and close a leftover.

    Raises:
        CannotStopError: the process does not stop, or a thread runs the leftover code.
        UnsupportedError, NotPermittedError: its memory has no room for the boot code, or it may not be traced.
    """
    with Process(leftover.pid) as process:
        in_tracing_thread(lambda: _remove(process, leftover))


def _has_ended(booted: BootedThread) -> bool:
    """Stop the thread, and return whether it has made its calls; otherwise it runs on."""
    time.sleep(_MOMENT)
    if not booted.stop():
        return False
    if booted.has_made_calls:
        return True
    ptrace.cont(booted.tracee.tid)
    return False


def _remove(process: Process, leftover: Leftover) -> None:
    frozen = FrozenProcess(process)
    with all_stopped(frozen):
        machine = frozen.machine
        inside = range(leftover.start, leftover.end)
        # It may still restore threads: unmapping it under one would kill the process.
        if any(int(pc) in inside for pc in frozen.stopped.registers[:, machine.pc]):
            raise CannotStopError(f"process {process.label}: a thread runs the code that is left", help="try again")
        numbers = machine.calls
        rows = np.zeros((CALLS, 7), np.uint64)
        # The boot code makes all of its calls: this one has no effect.
        rows[:, 0] = numbers["getpid"]
        rows[0, :3] = numbers["munmap"], leftover.start, leftover.end - leftover.start
        if leftover.uffd >= 0:
            rows[1, :2] = numbers["close"], leftover.uffd
        # Only for the padding: nothing is mapped.
        place = Place.find(frozen, 0, 1 << 21)
        booted = BootedThread(frozen, choose(frozen), place.slot(frozen), rows, None)
        booted.start()
        booted.await_that(lambda: _has_ended(booted))
        booted.put_back()
