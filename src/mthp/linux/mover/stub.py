"""The memory that the code inside a target works on: its layout and its contents.

Each machine has code of its own (:mod:`~mthp.linux.mover.arch`); header, operations and the order of steps are the same
for all. The code is position-independent. It is one mapping, which exists for one window::

    code | trampolines, one for each thread | header, operations, contexts | scratch
    R-X  | R-X                              | RW-                          | RW-, armed with a userfaultfd meanwhile

Each part begins on a page of its own. The machine also defines the trampolines: on x86-64 a trampoline restores the
last registers of one thread.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mthp.linux.mover.arch import native
from mthp.linux.mover.arch.architecture import Architecture, Registers
from mthp.linux.mover.ptrace import ALL_SIGNALS
from mthp.linux.probes import UFFD_API, UFFD_FEATURE_MOVE, UFFDIO_REGISTER_MODE_MISSING

# SETUP becomes GO when the worker begins, and then DONE; or ABORT after half a second without a tracer.
SETUP, GO, DONE, ABORT = range(4)
"""States of the header: set-up by the tracer, work, finished, abandoned before any work."""

NO_FD = (1 << 64) - 1
"""-1: the number of a missing descriptor."""

FLAG_VERIFY = 1
FLAG_FILL = 2

NOT_TRIED = 1
"""Value of an operation's error field until the worker reaches it; errors are negative, success is 0."""

HEADER_BYTES = 256
STATE_BYTES = 4
"""The first bytes of the header."""

NO_STAGE, EMPTY, CREATE, HANDSHAKE, ARM = range(5)
"""Stages of the worker's preparation: empty the scratch memory, then create, handshake and arm a userfaultfd."""

_HEADER = "=32Q"
_PREPARED = struct.Struct("=Qq")
PREPARED_OFFSET = 80
MAPPED_OFFSET, WRITTEN_OFFSET, START_OFFSET = 232, 240, 248

WORK, UNMAP_ALL = 1, 2
"""Values of START: the work that the worker may do."""

_CPUCLOCK_PERTHREAD, _CPUCLOCK_SCHED = 4, 2
"""Bits of the clock of a thread's processor time (include/linux/posix-timers_types.h)."""

_PATH_BYTES = 48

_TIME = np.dtype([("seconds", np.int64), ("nanoseconds", np.int64)])
OPERATION = np.dtype(
    [
        ("address", np.uint64),
        ("length", np.uint64),
        ("flags", np.uint64),
        ("error", np.int64),
        ("moved", np.int64),
        ("hash_before", np.uint64),
        ("hash_after", np.uint64),
        ("populated", np.uint64),
        ("begun", _TIME),
        ("away", _TIME),
        ("copied", _TIME),
        ("ended", _TIME),
    ]
)
"""A block to move, or a run of neighbours (:mod:`~mthp.linux.mover.adjacent`), as the worker reads and writes it."""


@dataclass(frozen=True)
class Layout:
    """Addresses and sizes of the parts of the injected mapping, in bytes.

    Attributes:
        base: start of the mapping.
        threads: number of contexts.
        operations: number of operations.
        scratch_size: size of the scratch area, as large as the largest block.
    """

    base: int
    threads: int
    operations: int
    scratch_size: int
    machine: Architecture = field(default_factory=native)
    page_size: int = mmap.PAGESIZE

    @cached_property
    def code_size(self) -> int:
        """Return the size of the executable part."""
        return self._trampolines - self.base + self._whole_pages(self.threads * self.machine.trampoline_bytes)

    @property
    def _trampolines(self) -> int:
        return self.base + self._whole_pages(len(self.machine.code))

    @cached_property
    def header(self) -> int:
        """Return the address of the header."""
        return self.base + self.code_size

    @cached_property
    def data_size(self) -> int:
        """Return the size of header, operations and contexts."""
        used = HEADER_BYTES + self.operations * OPERATION.itemsize + self.threads * self.machine.context_bytes
        return self._whole_pages(used)

    @property
    def scratch(self) -> int:
        """Return the address of the scratch area."""
        return self.header + self.data_size

    @property
    def size(self) -> int:
        """Return the size of all parts."""
        return self.code_size + self.data_size + self.scratch_size

    @cached_property
    def contexts(self) -> int:
        """Return the address of the first context."""
        return self.header + HEADER_BYTES + self.operations * OPERATION.itemsize

    def context(self, index: int) -> int:
        """Return the address of a thread's context."""
        return self.contexts + index * self.machine.context_bytes

    def trampoline(self, index: int) -> int:
        """Return the address of a thread's trampoline."""
        return self._trampolines + index * self.machine.trampoline_bytes

    @cached_property
    def executable(self) -> bytes:
        """Return code and trampolines, as they are written to :attr:`base`."""
        machine = self.machine
        trampolines = (machine.trampoline(self.trampoline(row), self.context(row)) for row in range(self.threads))
        return machine.code.ljust(self._trampolines - self.base, b"\0") + b"".join(trampolines)

    def parked(self, homes: Registers) -> Registers:
        """Return the registers of threads that wait in the parking loop, at the beginning of the code."""
        contexts = (self.contexts + np.arange(len(homes)) * self.machine.context_bytes).astype(np.uint64)
        return self.machine.parked(homes, contexts, self.base, self.header)

    def pack_contexts(self, homes: Registers, masks: NDArray[np.uint64], numbers: Sequence[int], keeper: int) -> bytes:
        """Return the data from which threads restore themselves without a tracer, as it is written to :attr:`contexts`.

        Args:
            homes: their registers: uint64, shape (threads, words).
            masks: their blocked signals: uint64, shape (threads,).
            numbers: their TIDs in the target's PID namespace.
            keeper: row of the thread that unmaps everything.
        """
        own_code = self._trampolines + np.arange(len(homes)) * self.machine.trampoline_bytes
        contexts = self.machine.pack_contexts(homes, masks, own_code.astype(np.uint64))
        _here, _left, clock, _used, kept, path = range(self.machine.keeper_word, self.machine.keeper_word + 6)
        # A thread that has used processor time since it had its signal mask again has left the code.
        clocks = (~np.array(numbers, np.int64) << 3) | _CPUCLOCK_PERTHREAD | _CPUCLOCK_SCHED
        contexts[:, clock], contexts[keeper, kept] = clocks.view(np.uint64), 1
        # Shows the keeper the program counter and the stack pointer of a thread that sleeps.
        paths = np.array([f"/proc/self/task/{number}/syscall" for number in numbers], f"S{_PATH_BYTES}")
        contexts[:, path : path + _PATH_BYTES // 8] = paths.view(np.uint64).reshape(len(numbers), -1)
        return contexts.tobytes()

    def _whole_pages(self, size: int) -> int:
        return -(-size // self.page_size) * self.page_size


def pack_header(layout: Layout, unmap: int, operations: NDArray[np.void]) -> bytes:
    """Return header and operations for one window, in the state SETUP.

    Args:
        unmap: address of the code that unmaps `layout`.
        operations: :data:`OPERATION`, shape (operations,).
    """
    move, api = (0,) * 5, (UFFD_API, UFFD_FEATURE_MOVE, 0)
    register = (layout.scratch, layout.scratch_size, UFFDIO_REGISTER_MODE_MISSING, 0)
    code = (layout.base, layout.base + layout.code_size, layout.contexts, layout.threads, unmap)
    # The order of the words is that of the offsets at the top of the stub's source.
    head = (SETUP, len(operations), layout.scratch, NO_FD, *move, ALL_SIGNALS, NO_STAGE, 0)
    header = struct.pack(_HEADER, *head, *api, *register, layout.scratch_size, *code, *(0,) * 7)
    return header.ljust(HEADER_BYTES, b"\0") + operations.tobytes()


def operations_for(addresses: ArrayLike, lengths: ArrayLike, flags: int) -> NDArray[np.void]:
    """Return operations to move `lengths` bytes from each of `addresses` on: :data:`OPERATION`, shape (operations,)."""
    operations = np.zeros(np.shape(addresses), OPERATION)
    operations["address"], operations["length"] = addresses, lengths
    operations["flags"] = flags
    operations["error"] = NOT_TRIED
    return operations


def nanoseconds(times: NDArray[np.void]) -> NDArray[np.int64]:
    """Return times of the target's monotonic clock in nanoseconds, 0 where missing: int64, shape (operations,)."""
    total: NDArray[np.int64] = times["seconds"] * 1_000_000_000 + times["nanoseconds"]
    return total


def unpack_preparation(data: bytes) -> tuple[int, int]:
    """Return the last stage that the worker began, and its errno, from the bytes at :data:`PREPARED_OFFSET`."""
    stage, error = _PREPARED.unpack(data)
    return stage, -error


PREPARED_BYTES = _PREPARED.size
