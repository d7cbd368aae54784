"""ptrace(2) as the mover needs it: a few requests on x86-64, each a function that raises OSError.

The numbers are those of include/uapi/linux/ptrace.h, the register file that of arch/x86/include/uapi/asm/ptrace.h
(``struct user_regs_struct``).

The C library is called with the interpreter's lock held (:class:`ctypes.PyDLL`): no request here blocks, and letting
another Python thread in between two of them would lengthen the time for which the target stands still.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

PTRACE_CONT = 7
PTRACE_GETREGS = 12
PTRACE_SETREGS = 13
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_SETOPTIONS = 0x4200
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

SIGSET_BYTES = 8
ALL_SIGNALS = (1 << 64) - 1
NO_SYSCALL = (1 << 64) - 1
"""In ``orig_rax``: not in a system call, so nothing is there to be restarted."""

USER_CS = 0x33
"""Code segment of a thread that runs 64-bit code (__USER_CS)."""

_RSEQ_CONFIGURATION = "=QIIII"
_DISPATCH_CONFIG = "=QQQQ"


REGISTERS = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
    *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
"""Names of the general registers, in the order of ``struct user_regs_struct``."""


class Registers(ctypes.Structure):
    """``struct user_regs_struct`` of x86-64."""

    r15: int
    r14: int
    r13: int
    r12: int
    rbp: int
    rbx: int
    r11: int
    r10: int
    r9: int
    r8: int
    rax: int
    rcx: int
    rdx: int
    rsi: int
    rdi: int
    orig_rax: int
    rip: int
    cs: int
    eflags: int
    rsp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int

    _fields_ = tuple((name, ctypes.c_uint64) for name in REGISTERS)

    def copy(self) -> Registers:
        """Another one with the same values."""
        return Registers.from_buffer_copy(self)


_libc = ctypes.PyDLL(None, use_errno=True)
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)


def _request(request: int, tid: int, address: int = 0, data: int = 0) -> None:
    if _libc.ptrace(request, tid, address, data) < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"ptrace({request:#x}, {tid}): {os.strerror(error)}")


def seize(tid: int) -> None:
    """Become the tracer of `tid` without stopping it."""
    _request(PTRACE_SEIZE, tid)


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
    """Let a stopped thread go."""
    _request(PTRACE_DETACH, tid)


def set_options(tid: int, options: int) -> None:
    """Set ``PTRACE_O_*`` of a stopped thread."""
    _request(PTRACE_SETOPTIONS, tid, 0, options)


def get_registers(tid: int) -> Registers:
    """The general registers of a stopped thread."""
    registers = Registers()
    _request(PTRACE_GETREGS, tid, 0, ctypes.addressof(registers))
    return registers


def set_registers(tid: int, registers: Registers) -> None:
    """Set the general registers of a stopped thread."""
    _request(PTRACE_SETREGS, tid, 0, ctypes.addressof(registers))


def get_signal_mask(tid: int) -> int:
    """The blocked signals; where a system call set them for its own time, those that it will put back."""
    mask = ctypes.c_uint64()
    _request(PTRACE_GETSIGMASK, tid, SIGSET_BYTES, ctypes.addressof(mask))
    return mask.value


def set_signal_mask(tid: int, mask: int) -> None:
    """Set the blocked signals of a stopped thread."""
    value = ctypes.c_uint64(mask)
    _request(PTRACE_SETSIGMASK, tid, SIGSET_BYTES, ctypes.addressof(value))


def rseq_area(tid: int) -> int:
    """Address of the ``struct rseq`` that a stopped thread registered, 0 if none or if the kernel has no rseq(2)."""
    size = struct.calcsize(_RSEQ_CONFIGURATION)
    buffer = ctypes.create_string_buffer(size)
    try:
        _request(PTRACE_GET_RSEQ_CONFIGURATION, tid, size, ctypes.addressof(buffer))
    except OSError as error:
        if error.errno in (errno.EIO, errno.EINVAL):
            return 0
        raise
    return int(struct.unpack(_RSEQ_CONFIGURATION, buffer.raw)[0])


def dispatches_syscalls(tid: int) -> bool:
    """Whether a stopped thread has its system calls turned into SIGSYS (prctl(PR_SET_SYSCALL_USER_DISPATCH))."""
    size = struct.calcsize(_DISPATCH_CONFIG)
    buffer = ctypes.create_string_buffer(size)
    try:
        _request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, tid, size, ctypes.addressof(buffer))
    except OSError as error:
        if error.errno in (errno.EIO, errno.EINVAL):
            return False
        raise
    return int(struct.unpack(_DISPATCH_CONFIG, buffer.raw)[0]) != 0
