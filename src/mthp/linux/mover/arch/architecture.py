"""A machine as the mover needs it: registers, system calls, and the code that runs inside a target.

All else is the same on every architecture. Registers come as columns, one row for each thread, so that every operation
covers all threads at once: a stop costs microseconds for each thread.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

Registers = NDArray[np.uint64]
"""General registers, as the register set NT_PRSTATUS holds them, one row for each thread: uint64, shape (threads,
:attr:`Architecture.words`), contiguous."""

_Addresses = NDArray[np.uint64]
_Bools = NDArray[np.bool_]

ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
"""Negated results of a system call that a signal interrupted (include/linux/errno.h)."""


class Architecture(abc.ABC):
    """One architecture. It has no state and is the same for every process.

    Attributes:
        name: name in ``uname -m``.
        words: number of general registers.
        pc, sp: columns of the program counter and the stack pointer.
        number, result: columns of a system call's number and its result.
        arguments: columns of its arguments.
        syscall: the bytes of the instruction.
        alignment: alignment of instructions, in bytes.
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
        slot_bytes: size of the boot code with its data, a multiple of 64.
        boot_stack: offset behind it of the stack pointer that the thread is restored with.
        context_bytes: size of a context, from which a thread restores itself.
        keeper_word: index of the first of a context's words that :class:`~mthp.linux.mover.stub.Layout` fills in.
        trampoline_bytes: size of each thread's own code.
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
        """Return which threads do not run code of this machine's full word size: bool, shape (threads,)."""

    @abc.abstractmethod
    def in_call(self, registers: Registers) -> _Bools:
        """Return which threads are certainly in a system call: bool, shape (threads,)."""

    @abc.abstractmethod
    def repair(self, registers: Registers) -> _Bools:
        """Repair, in place, an EINTR that only the stop caused; return the changed rows: bool, shape (threads,)."""

    @abc.abstractmethod
    def leave_call(self, registers: Registers) -> None:
        """Change registers in place so that the kernel does not restart a system call with them."""

    @abc.abstractmethod
    def parked(self, homes: Registers, contexts: _Addresses, entry: int, header: int) -> Registers:
        """Return the registers of threads that are to run the stub.

        Args:
            contexts: addresses of their contexts: uint64, shape (threads,).
            entry: address at which they begin.
            header: address of the header.
        """

    @abc.abstractmethod
    def pack_contexts(self, homes: Registers, masks: _Addresses, trampolines: _Addresses) -> _Addresses:
        """Return the contexts from which threads restore themselves: uint64, shape (threads, context_bytes / 8).

        Args:
            masks: their blocked signals: uint64, shape (threads,).
            trampolines: addresses of their own code: uint64, shape (threads,).
        """

    @abc.abstractmethod
    def pack_boot(
        self, tid: int, home: Registers, mask: int, stub: tuple[int, int, int], calls: NDArray[np.uint64]
    ) -> bytes:
        """Return :attr:`boot` with its data: the thread to be restored, and the calls that it makes.

        Args:
            tid: the thread, which is stopped.
            home: its general registers: uint64, shape (1, words).
            mask: its blocked signals.
            stub: addresses of the header, the thread's context and the parking loop; 0 if it is to make calls only.
            calls: number and six arguments of each: uint64, shape (4, 7).
        """

    @abc.abstractmethod
    def trampoline(self, at: int, context: int) -> bytes:
        """Return the thread's own code at address `at`, for the thread with the context at `context`."""

    def refuse_extended(self, tids: list[int]) -> str:
        """Return why the stub must not run in one of `tids`, stopped, for its non-general registers; "" if it may."""
        del tids
        return ""
