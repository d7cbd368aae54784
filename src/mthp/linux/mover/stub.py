"""The code that runs inside the target, as bytes, and the layout of the memory that it works on.

:data:`CODE` is ``stub_x86_64.S`` beside this file, assembled; no compiler is needed at run time, and a test compares
the two, the constants included. The code is position-independent. What is injected is one mapping::

    code page | trampolines, 32 bytes for each thread | header, operations, contexts | scratch
    R-X       | R-X                                   | RW-                          | RW-, registered with userfaultfd

A trampoline restores the last three registers of one thread (rbx, rsp, rip) from fixed addresses, without needing a
register for it.
"""

from __future__ import annotations

import ctypes
import operator
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.linux.mover.ptrace import ALL_SIGNALS, NO_SYSCALL, REGISTERS, Registers
from mthp.linux.mover.tracee import (
    ERESTART_RESTARTBLOCK,
    ERESTARTNOHAND,
    ERESTARTNOINTR,
    ERESTARTSYS,
    NR_RESTART_SYSCALL,
)

CODE = bytes.fromhex(
    """
    e93601000066662e0f1f840000000000b80e000000bf02000000488d7548ba0000000041ba080000000f058b4d0083f9020f839300000083
    f900754448ff83980000004883bb9800000064736948c783a00000000000000048c783a8000000404b4c00b80f01000031ff31f6488d93a0
    0000004531d241b8080000000f05ebab48c783a00000000000000048c783a8000000400d0300b80f01000031ff31f6488d93a00000004531
    d241b8080000000f05e975ffffffb800000000b903000000f00fb14d00e961ffffff488da300010000ff73109d488b6308b80e000000bf02
    000000488db390000000ba0000000041ba080000000f05488b4318488b4b28488b5330488b7338488b7b40488b6b484c8b43504c8b4b584c
    8b53604c8b5b684c8b63704c8b6b784c8bb3800000004c8bbb88000000ffa3b0000000b800000000b901000000f00fb14d000f85dbfeffff
    4531e44c8dad800000004c3b65080f83ae010000b8e4000000bf01000000498d75400f0549f74510020000007421b81c000000498b7d0049
    8b7508ba170000000f05498945184885c00f855401000049f7451001000000744fb81c000000498b7d00498b7508ba160000000f05498945
    184885c00f8529010000498b7500498b4d0848ba157c4a7fb979379e4889d0483306480fafc248c1c01d4883c6084883e90875eb49894528
    4c8b75104c897520498b450048894528498b45084889453048c745380000000048c7454000000000b810000000488b7d18be05aa28c0488d
    55200f0549894518b8e4000000bf01000000498d75500f05488b4d404883f9007e3649894d20498b7d004c89f648c1e903fcf348a5b8e400
    0000bf01000000498d75600f05b81c0000004c89f7498b7520ba040000000f0549837d18f0752c49837d3800752549c7453801000000b81c
    000000498b7d00498b7508ba170000000f054885c00f843dffffff49f7451001000000742e498b7500498b4d0848ba157c4a7fb979379e48
    89d0483306480fafc248c1c01d4883c6084883e90875eb49894530b8e4000000bf01000000498d75700f0549ffc44981c580000000e948fe
    ffffc745000200000048c783a00000000000000048c783a800000080f0fa02b80f01000031ff31f6488d93a00000004531d241b808000000
    0f05e9dcfcffff
    """
)

ENTRY_WORKER = 0
ENTRY_PARK = 16

SETUP, GO, DONE, ABORT = range(4)
"""States of the header: the tracer sets up, the worker works, it has finished, nothing was begun and nothing will."""

FLAG_VERIFY = 1
FLAG_FILL = 2

NOT_TRIED = 1
"""In an operation's error field until the worker has come to it; errors are negative, success is 0."""

PAGE = 4096
HEADER_BYTES = 128
CONTEXT_BYTES = 256
TRAMPOLINE_BYTES = 32
SYSCALL_BYTES = 2
"""Length of the instruction ``syscall``."""

_STATE = "=I"
_HEADER = "=QQQQ5QQQ"
_CLEARED_FLAGS = 0x100 | 0x400 | 0x40000
"""TF, DF and AC of the flags register: single step, string direction, alignment check."""

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
"""One block to move, as the worker reads and writes it."""

_ALL_REGISTERS = struct.Struct(f"={len(REGISTERS)}Q")
_CONTEXT_REGISTERS = (
    *("rip", "rsp", "eflags", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp"),
    *(f"r{number}" for number in range(8, 16)),
)
_in_context_order = operator.itemgetter(*(REGISTERS.index(name) for name in _CONTEXT_REGISTERS))
_CONTEXT = struct.Struct(f"={len(_CONTEXT_REGISTERS) + 5}Q")
"""The registers, signal mask, ticks, a timespec, and the address of the trampoline."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things are in the injected mapping. All addresses and sizes in bytes.

    Attributes:
        base: where it begins.
        threads: how many contexts it has.
        operations: how many operations.
        scratch_size: size of the scratch area, as much as the largest block.
    """

    base: int
    threads: int
    operations: int
    scratch_size: int

    @property
    def code_size(self) -> int:
        """The part that may be executed."""
        return PAGE + _whole_pages(self.threads * TRAMPOLINE_BYTES)

    @property
    def header(self) -> int:
        """Address of the header."""
        return self.base + self.code_size

    @property
    def data_size(self) -> int:
        """Header, operations and contexts."""
        used = HEADER_BYTES + self.operations * OPERATION.itemsize + self.threads * CONTEXT_BYTES
        return _whole_pages(used)

    @property
    def scratch(self) -> int:
        """Address of the scratch area."""
        return self.header + self.data_size

    @property
    def size(self) -> int:
        """All of it."""
        return self.code_size + self.data_size + self.scratch_size

    @property
    def contexts(self) -> int:
        """Address of the first context."""
        return self.header + HEADER_BYTES + self.operations * OPERATION.itemsize

    def context(self, index: int) -> int:
        """Address of a thread's context."""
        return self.contexts + index * CONTEXT_BYTES

    def trampoline(self, index: int) -> int:
        """Address of a thread's trampoline."""
        return self.base + PAGE + index * TRAMPOLINE_BYTES

    def executable(self) -> bytes:
        """Code and trampolines, as they are written to :attr:`base`."""
        trampolines = b"".join(self._trampoline_code(index) for index in range(self.threads))
        return CODE.ljust(PAGE, b"\xcc") + trampolines

    def _trampoline_code(self, index: int) -> bytes:
        at, context = self.trampoline(index), self.context(index)

        def relative(offset: int, end: int) -> bytes:
            return struct.pack("=i", context + offset - (at + end))

        code = b"\x48\x8b\x1d" + relative(32, 7)  # mov rbx, [rip + ...]
        code += b"\x48\x8b\x25" + relative(8, 14)  # mov rsp, [rip + ...]
        code += b"\xff\x25" + relative(0, 20)  # jmp [rip + ...]
        return code.ljust(TRAMPOLINE_BYTES, b"\xcc")

    def holds_code(self, rip: int) -> bool:
        """Whether `rip` lies in what was injected."""
        return self.base <= rip < self.base + self.code_size

    def overlaps(self, start: int, end: int) -> bool:
        """Whether the range from `start` to `end` holds something that was injected."""
        return start < self.base + self.size and end > self.base

    def park(self, home: Registers, index: int, entry: int) -> Registers:
        """The registers of a thread that runs `entry` of the stub with the context of `index`."""
        registers = home.copy()
        registers.rip = self.base + entry
        registers.rbx = self.context(index)
        registers.rbp = self.header
        registers.orig_rax = NO_SYSCALL
        registers.eflags &= ~_CLEARED_FLAGS
        return registers

    def pack_context(self, home: Registers, mask: int, index: int) -> bytes:
        """What a thread restores itself from, if nobody else does."""
        words = _in_context_order(_ALL_REGISTERS.unpack(alone(home)))
        packed = _CONTEXT.pack(*words, mask, 0, 0, 0, self.trampoline(index))
        return packed.ljust(CONTEXT_BYTES, b"\0")


def alone(home: Registers) -> Registers:
    """Registers with which a thread goes on that the kernel does not help any more to restart its system call.

    What arch_do_signal_or_restart (arch/x86/kernel/signal.c) does to a thread that leaves an interrupted call without
    a handler to run, done beforehand.
    """
    registers = home.copy()
    call, result = _signed(home.orig_rax), _signed(home.rax)
    if call < 0:
        return registers
    if -result in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND):
        registers.rax = home.orig_rax
        registers.rip -= SYSCALL_BYTES
    elif -result == ERESTART_RESTARTBLOCK:
        registers.rax = NR_RESTART_SYSCALL
        registers.rip -= SYSCALL_BYTES
    return registers


def pack_header(layout: Layout, uffd: int, nonce: int, operations: NDArray[np.void]) -> bytes:
    """Header and operations for one window, in the state SETUP."""
    header = struct.pack(_HEADER, SETUP, len(operations), layout.scratch, uffd, 0, 0, 0, 0, 0, ALL_SIGNALS, nonce)
    return header.ljust(HEADER_BYTES, b"\0") + operations.tobytes()


def operations_for(blocks: Sequence[tuple[int, int]], flags: int) -> NDArray[np.void]:
    """Operations to move blocks of (address, bytes): :data:`OPERATION`, shape (blocks,)."""
    operations = np.zeros(len(blocks), OPERATION)
    for index, (address, length) in enumerate(blocks):
        operations[index]["address"] = address
        operations[index]["length"] = length
    operations["flags"] = flags
    operations["error"] = NOT_TRIED
    return operations


NONCE_OFFSET = 80
STATE_BYTES = struct.calcsize(_STATE)


def pack_state(state: int) -> bytes:
    """A state as it stands in the header."""
    return struct.pack(_STATE, state)


def unpack_state(data: bytes) -> int:
    """The state from the first bytes of the header."""
    return int(struct.unpack(_STATE, data)[0])


def nanoseconds(times: NDArray[np.void]) -> NDArray[np.int64]:
    """Times of the target's monotonic clock in nanoseconds, 0 where none was taken: int64, shape (operations,)."""
    total: NDArray[np.int64] = times["seconds"] * 1_000_000_000 + times["nanoseconds"]
    return total


def _whole_pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _signed(value: int) -> int:
    return ctypes.c_int64(value).value
