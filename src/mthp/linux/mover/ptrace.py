"""Make the ptrace(2) requests of the mover for one thread; each function raises OSError.

Requests for all threads at once go through :mod:`~mthp.linux.mover.callbatches`, with the same numbers, those of
include/uapi/linux/ptrace.h. General registers are read and set as the register set NT_PRSTATUS, which every
architecture has; its layout is in the machine (:mod:`~mthp.linux.mover.arch.architecture`).
"""

from __future__ import annotations

import ctypes
import errno
import os

import numpy as np
from numpy.typing import NDArray

PTRACE_CONT = 7
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_SETOPTIONS = 0x4200
PTRACE_GETREGSET = 0x4204
PTRACE_SETREGSET = 0x4205
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_GET_RSEQ_CONFIGURATION = 0x420F
PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211

PTRACE_EVENT_STOP = 128
PTRACE_O_TRACESYSGOOD = 1 << 0
"""Stops at system calls report SIGTRAP | 0x80, so that they cannot be mistaken for a signal."""

PTRACE_O_EXITKILL = 1 << 20
"""If the tracer exits, the kernel kills this tracee."""

NT_PRSTATUS = 1
"""The general registers (include/uapi/linux/elf.h)."""

SIGSET_BYTES = 8
ALL_SIGNALS = (1 << 64) - 1

RSEQ_CONFIGURATION_WORDS = 3
"""``struct ptrace_rseq_configuration`` in words of 64 bits; the first is the area's address."""

DISPATCH_CONFIGURATION_WORDS = 4
"""``struct ptrace_sud_config``; the first is the mode."""

# PyDLL holds the interpreter's lock: no request here blocks, and another Python thread between two of them would
# lengthen the time for which the target is stopped.
_libc = ctypes.PyDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_long)


def _request(request: int, tid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, tid, address, data) < 0:
        raise failure(request, tid, ctypes.get_errno())


def failure(request: int, tid: int, error: int) -> OSError:
    """Return the exception for a request that ended with errno `error`."""
    return OSError(error, f"ptrace({request:#x}, {tid}): {os.strerror(error)}")


def interrupt(tid: int) -> None:
    """Have a seized thread stop soon with PTRACE_EVENT_STOP."""
    _request(PTRACE_INTERRUPT, tid)


def cont(tid: int, signal: int = 0) -> None:
    """Let a stopped thread run on, with `signal` delivered if it is not 0."""
    _request(PTRACE_CONT, tid, 0, signal)


def run_to_syscall(tid: int, signal: int = 0) -> None:
    """Let a stopped thread run until it enters or leaves a system call."""
    _request(PTRACE_SYSCALL, tid, 0, signal)


def detach(tid: int) -> None:
    """Release a stopped thread."""
    _request(PTRACE_DETACH, tid)


def set_options(tid: int, options: int) -> None:
    """Set ``PTRACE_O_*`` of a stopped thread."""
    _request(PTRACE_SETOPTIONS, tid, 0, options)


def get_registers(tid: int, words: int) -> NDArray[np.uint64]:
    """Return the general registers of a stopped thread: uint64, shape (1, words)."""
    return _register_set(tid, NT_PRSTATUS, words)


def get_register_set(tid: int, kind: int, words: int) -> NDArray[np.uint64] | None:
    """Return the first words of a stopped thread's register set `kind` (``NT_*``); None if the machine lacks it."""
    try:
        first: NDArray[np.uint64] = _register_set(tid, kind, words)[0]
    except OSError as error:
        # EINVAL if the kernel does not know the set, ENODEV if the processor lacks it.
        if error.errno not in (errno.EINVAL, errno.ENODEV, errno.EIO):
            raise
        return None
    return first


def _register_set(tid: int, kind: int, words: int) -> NDArray[np.uint64]:
    registers = np.zeros((1, words), np.uint64)
    vector = vectors(registers)
    _request(PTRACE_GETREGSET, tid, kind, address_of(vector))
    return registers


def set_registers(tid: int, registers: NDArray[np.uint64]) -> None:
    """Set the general registers of a stopped thread; uint64, shape (1, words)."""
    vector = vectors(registers)
    _request(PTRACE_SETREGSET, tid, NT_PRSTATUS, address_of(vector))


def set_signal_mask(tid: int, mask: int) -> None:
    """Set the blocked signals of a stopped thread."""
    value = ctypes.c_uint64(mask)
    _request(PTRACE_SETSIGMASK, tid, SIGSET_BYTES, ctypes.addressof(value))


def address_of(array: NDArray[np.uint64]) -> int:
    """Return the address of a contiguous array."""
    address: int = array.__array_interface__["data"][0]
    return address


def addresses_of(array: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the address of each row of a contiguous array: uint64, shape (rows,)."""
    return address_of(array) + np.arange(len(array), dtype=np.uint64) * np.uint64(array.strides[0])


def vectors(registers: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return a ``struct iovec`` for each row of a contiguous array: uint64, shape (rows, 2)."""
    made = np.empty((len(registers), 2), np.uint64)
    made[:, 0], made[:, 1] = addresses_of(registers), registers.strides[0]
    return made
