"""What the mover has to know of a machine: registers, system calls, and the code that runs inside a target.

All else is the same on every architecture. Registers come as columns, one row for each thread, so that whatever is
done to them is done to those of all threads at once: a stop is paid for by the microsecond, and by the thread.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Registers = NDArray[np.uint64]
"""General registers, as the register set NT_PRSTATUS holds them, one row for each thread: uint64, shape (threads,
:attr:`Machine.words`), contiguous."""

_Addresses = NDArray[np.uint64]
_Bools = NDArray[np.bool_]

ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
"""What a system call that a signal interrupted leaves as its result, negated (include/linux/errno.h)."""


class Machine(abc.ABC):
    """One architecture. Has no state; all is the same for every process.

    Attributes:
        name: as ``uname -m`` gives it.
        words: how many general registers there are.
        pc, sp: columns of the program counter and the stack pointer.
        number, result: columns of a system call's number and its result.
        arguments: those of its arguments.
        syscall: the bytes of the instruction.
        alignment: of instructions, in bytes.
        forgets_calls: whether the kernel forgets which system call a stop has interrupted, once the thread goes on from
            there (:mod:`~mthp.linux.mover.reentry`).
        calls: numbers of the system calls that the tracer makes, or has the target make.
        red_zone: bytes below the stack pointer that a function may use without moving it.
        code: the stub, assembled.
        boot: the code that maps and unmaps the stub's memory, assembled.
        boot_entry, boot_begin, boot_unmap: offsets into it: for a thread with its own signal mask, for one that blocks
            all signals, and of the last call alone.
        boot_row, boot_error: columns of the call that it makes, and of the error of one that failed.
        boot_rows: offset of its calls.
        slot_bytes: what the boot code takes up with its data, a multiple of 64.
        boot_stack: offset behind it of the stack pointer that the thread is restored with.
        context_bytes: of what a thread restores itself from.
        keeper_word: index of the first of a context's words that :class:`~mthp.linux.mover.stub.Layout` fills in.
        trampoline_bytes: of code that every thread has for itself.
    """

    name: ClassVar[str]
    words: ClassVar[int]
    pc: ClassVar[int]
    sp: ClassVar[int]
    number: ClassVar[int]
    result: ClassVar[int]
    arguments: ClassVar[tuple[int, ...]]
    syscall: ClassVar[bytes]
    alignment: ClassVar[int]
    forgets_calls: ClassVar[bool]
    calls: ClassVar[Mapping[str, int]]
    red_zone: ClassVar[int]
    code: ClassVar[bytes]
    boot: ClassVar[bytes]
    boot_entry: ClassVar[int]
    boot_begin: ClassVar[int]
    boot_unmap: ClassVar[int]
    boot_row: ClassVar[int]
    boot_error: ClassVar[int]
    boot_rows: ClassVar[int]
    boot_stack: ClassVar[int]
    slot_bytes: ClassVar[int]
    context_bytes: ClassVar[int]
    keeper_word: ClassVar[int]
    trampoline_bytes: ClassVar[int]

    @abc.abstractmethod
    def foreign(self, registers: Registers) -> _Bools:
        """Which threads do not run code of this machine's full word size: bool, shape (threads,)."""

    @abc.abstractmethod
    def in_call(self, registers: Registers) -> _Bools:
        """Which threads surely stand in a system call: bool, shape (threads,)."""

    @abc.abstractmethod
    def repair(self, registers: Registers) -> _Bools:
        """Make good, in place, an EINTR that only the stop caused; which rows were changed: bool, shape (threads,)."""

    @abc.abstractmethod
    def leave_call(self, registers: Registers) -> None:
        """Have the kernel take these registers as they are, in place: no system call is to be restarted with them."""

    @abc.abstractmethod
    def parked(self, homes: Registers, contexts: _Addresses, entry: int, header: int) -> Registers:
        """The registers of threads that are to run the stub.

        Args:
            contexts: addresses of their contexts: uint64, shape (threads,).
            entry: address that they are to run from.
            header: address of the header.
        """

    @abc.abstractmethod
    def pack_contexts(self, homes: Registers, masks: _Addresses, trampolines: _Addresses) -> _Addresses:
        """What threads restore themselves from, if nobody else does: uint64, shape (threads, context_bytes / 8).

        Args:
            masks: their blocked signals: uint64, shape (threads,).
            trampolines: addresses of their own code: uint64, shape (threads,).
        """

    @abc.abstractmethod
    def pack_boot(
        self, tid: int, home: Registers, mask: int, stub: tuple[int, int, int], calls: NDArray[np.uint64]
    ) -> bytes:
        """Return :attr:`boot` with what follows it: the thread to be restored, and the calls that it makes.

        Args:
            tid: the thread, which is stopped.
            home: its general registers: uint64, shape (1, words).
            mask: its blocked signals.
            stub: addresses of the header, the thread's context and the parking loop; 0 if it is to make calls only.
            calls: number and six arguments of each: uint64, shape (4, 7).
        """

    @abc.abstractmethod
    def trampoline(self, at: int, context: int) -> bytes:
        """The code at address `at` that a thread with the context at `context` has for itself."""

    def refuse_extended(self, tids: list[int]) -> str:
        """Why the stub must not run in one of the stopped `tids` for its registers beyond the general; "" if it may."""
        del tids
        return ""
