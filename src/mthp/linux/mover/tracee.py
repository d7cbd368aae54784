"""One thread of a stopped target: what is to be known of it, and how it is put back.

Two things that a stop does to a thread are made good here, as the essay of :mod:`mthp.linux.mover.freeze` tells: an
EINTR that only the stop caused, and a restartable sequence that it interrupted.
"""

from __future__ import annotations

import ctypes
import errno
import struct
from collections.abc import Callable
from dataclasses import dataclass, field

from mthp.errors import UnsupportedError
from mthp.linux.mover import ptrace
from mthp.linux.mover.ptrace import Registers
from mthp.linux.mover.taskfiles import Thread
from mthp.linux.process import Process

Reader = Callable[[int, int], bytes]
"""Gives so many bytes of the target's memory, from an address on."""

ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
"""What a system call that a signal interrupted leaves in rax, negated (include/linux/errno.h)."""

NR_RESTART_SYSCALL = 219

EINTR_CALLS = frozenset(
    {
        232,  # epoll_wait
        281,  # epoll_pwait
        441,  # epoll_pwait2
        128,  # rt_sigtimedwait, and so sigwaitinfo
        65,  # semop
        220,  # semtimedop
        208,  # io_getevents
        333,  # io_pgetevents
        0,  # read, and those below: of a socket with SO_RCVTIMEO or SO_SNDTIMEO
        1,  # write
        19,  # readv
        20,  # writev
        42,  # connect
        43,  # accept
        288,  # accept4
        44,  # sendto
        45,  # recvfrom
        46,  # sendmsg
        47,  # recvmsg
        299,  # recvmmsg
        307,  # sendmmsg
    }
)
"""System calls of x86-64 that a stop makes return EINTR, where signal(7) has them restarted or not interrupted."""

_RSEQ_CS_OFFSET = 8
_RSEQ_CS = "=IIQQQ"


class CannotStopError(UnsupportedError):
    """The threads of the target could not be stopped, or must not be; everything was let go."""


@dataclass(slots=True, eq=False)
class Tracee:
    """One thread that stands still.

    Attributes:
        tid: its number.
        registers: as it stopped, an EINTR that only the stop caused made good.
        mask: its blocked signals.
        rseq_area: address of its ``struct rseq``, or 0.
        rseq_abort: where it goes on if its registers are changed meanwhile, because it stands in a restartable
            sequence; 0 otherwise.
        touched: whether registers or mask were changed since.
    """

    tid: int
    registers: Registers
    mask: int
    rseq_area: int = 0
    rseq_abort: int = 0
    touched: bool = field(default=False)

    @property
    def home(self) -> Registers:
        """Registers to go on with once others were set: those of the stop, or the sequence's abort handler."""
        home = self.registers.copy()
        if self.rseq_abort:
            home.rip = self.rseq_abort
            home.orig_rax = ptrace.NO_SYSCALL
        return home

    def put_back(self) -> None:
        """Give mask and registers back, in this order: a thread that may run handlers still runs only harmless code.

        Raises:
            OSError: ESRCH if it was killed.
        """
        ptrace.set_signal_mask(self.tid, self.mask)
        ptrace.set_registers(self.tid, self.home)
        self.touched = False


def examine(label: str, tid: int, read: Reader) -> Tracee:
    """Read what is needed of a thread that has just stopped and runs code of its own; repair its EINTR.

    Args:
        label: how to name the process.
        read: reads the target's memory.

    Raises:
        CannotStopError: it must not be given our code.
    """
    registers = ptrace.get_registers(tid)
    if registers.cs != ptrace.USER_CS:
        raise CannotStopError(f"process {label}: thread {tid} does not run 64-bit code")
    if ptrace.dispatches_syscalls(tid):
        raise CannotStopError(
            f"process {label}: thread {tid} intercepts its own system calls",
            help="prctl(PR_SET_SYSCALL_USER_DISPATCH), as Wine uses it, does not go together with the mover",
        )
    if registers.orig_rax in EINTR_CALLS and registers.rax == _negative(errno.EINTR):
        registers.rax = _negative(ERESTARTNOHAND)
        ptrace.set_registers(tid, registers)
    area = ptrace.rseq_area(tid)
    abort = _rseq_abort(area, registers.rip, read) if area else 0
    return Tracee(tid, registers, ptrace.get_signal_mask(tid), area, abort)


def _rseq_abort(area: int, rip: int, read: Reader) -> int:
    """The abort handler of the restartable sequence that `rip` lies in, 0 if none (include/uapi/linux/rseq.h)."""
    (sequence,) = struct.unpack("=Q", read(area + _RSEQ_CS_OFFSET, 8))
    if not sequence:
        return 0
    _, _, start, length, abort = struct.unpack(_RSEQ_CS, read(sequence, struct.calcsize(_RSEQ_CS)))
    return abort if start <= rip < start + length else 0


def check_threads(process: Process, threads: list[Thread]) -> dict[int, Thread]:
    """Give `threads` by TID if all may be given our code.

    Raises:
        CannotStopError: one may not.
    """
    for thread in threads:
        check_thread(process, thread)
    return {thread.tid: thread for thread in threads}


def check_thread(process: Process, thread: Thread) -> None:
    """Do nothing if `thread` may be given our code.

    Raises:
        CannotStopError: it filters system calls, which may kill it for ours, or is one of io_uring's.
    """
    if thread.seccomp:
        raise CannotStopError(
            f"process {process.label}: thread {thread.tid} filters its system calls (seccomp)",
            help="a filter may kill the process for the mover's calls",
        )
    if thread.comm.startswith("iou-"):
        raise CannotStopError(
            f"process {process.label} uses io_uring ({thread.comm}), which may hold its pages",
        )


def _negative(number: int) -> int:
    return ctypes.c_uint64(-number).value
