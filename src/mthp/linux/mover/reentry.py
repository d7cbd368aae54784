"""Have a thread make its interrupted system call again, before any signal reaches it.

Whether an interrupted system call is made again or returns EINTR depends on the call and on the signal's handler. The
kernel decides it when it delivers the signal. On x86-64 the registers hold all that it needs for that, and are put back
with it. On aarch64 only one visit to the kernel knows it: a thread that stopped in a call is rewound to the call's
instruction, and the kernel keeps the call itself in local variables (do_signal, arch/arm64/kernel/signal.c). Threads
that are stopped for the whole window do not leave that visit. But the thread that ran the injected code has: released
with a signal pending, it would run the handler as if it had not been waiting, and then begin to wait. A thread that
waits for that very signal, in pause(2) or in a read(2) with an alarm, would then wait for ever.

So such a thread, back at its instruction, is led into the call first and released there: the kernel decides as usual.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from typing import Protocol

from mthp.errors import MthpError
from mthp.linux.mover import ptrace
from mthp.linux.mover.arch.architecture import Architecture
from mthp.linux.mover.taskfiles import read_task_file
from mthp.linux.mover.tracee import Tracee, TraceeState
from mthp.linux.process import Process, status_fields

TIMEOUT_NS = 10_000_000_000
"""Nanoseconds that a thread may take to get to its call. Only a busy machine, or a frozen cgroup, delays it."""

SYSCALL_STOP = signal.SIGTRAP | 0x80
"""The stop at a system call, with PTRACE_O_TRACESYSGOOD."""

_QUEUED = ptrace.ALL_SIGNALS & -(1 << 33)
"""Real-time signals, from 34 on: the two before are the C library's own, and carry nothing (nptl(7))."""

_POLL_SECONDS = 5e-6


class Frozen(Protocol):
    """The part of :class:`~mthp.linux.mover.freeze.FrozenProcess` that this module needs."""

    @property
    def process(self) -> Process: ...
    @property
    def machine(self) -> Architecture: ...
    @property
    def tracees(self) -> Mapping[int, Tracee]: ...
    def read(self, address: int, size: int, /) -> bytes: ...
    def poll(self, tid: int, /) -> int | None: ...
    def has_exited(self, tid: int, /) -> bool: ...
    def stop_again(self, tid: int, /) -> bool: ...


def before_calls(frozen: Frozen) -> list[int]:
    """Return the restored threads whose interrupted system call the kernel has forgotten."""
    returned = [tid for tid, tracee in frozen.tracees.items() if tracee.state is TraceeState.RETURNED]
    return [tid for tid in returned if _is_before_call(frozen, tid)]


def _is_before_call(frozen: Frozen, tid: int) -> bool:
    machine = frozen.machine
    if not machine.forgets_calls:
        return False
    try:
        return frozen.read(int(frozen.tracees[tid].home[0, machine.pc]), len(machine.syscall)) == machine.syscall
    except MthpError:
        return False  # Nothing is mapped at the program counter.


def make_again(frozen: Frozen, tid: int) -> None:
    """Lead a stopped, restored thread into the system call at its program counter, and release it there.

    Raises:
        OSError: ESRCH if it was killed.
        CannotStopError: the thread neither runs nor stops.
    """
    mask = int(frozen.tracees[tid].stopped.masks[frozen.tracees[tid].row])
    held = _is_to_be_held(frozen, tid, mask)
    if held:
        _hold(tid)
    else:
        ptrace.set_options(tid, ptrace.PTRACE_O_TRACESYSGOOD)
    ptrace.run_to_syscall(tid)
    deadline = time.monotonic_ns() + TIMEOUT_NS
    while (stop := frozen.poll(tid)) != SYSCALL_STOP:
        if stop is not None:
            delivered = 0 if stop >> 8 else stop & 0xFF
            # Once it is blocked, a signal is queued again instead of being delivered (ptrace_signal, kernel/signal.c).
            if delivered and not held:
                held = True
                _hold(tid)
            ptrace.run_to_syscall(tid, delivered)
        elif frozen.has_exited(tid):
            return
        elif time.monotonic_ns() > deadline:
            if not frozen.stop_again(tid):
                return
            break
        else:
            time.sleep(_POLL_SECONDS)
    if held:
        ptrace.set_signal_mask(tid, mask)
    ptrace.detach(tid)


def _hold(tid: int) -> None:
    """Block all signals of a stopped thread; if the tracer dies before they are unblocked, the target dies too."""
    # If the tracer died now, the signals would stay blocked for good: rather the target dies, for this short time.
    ptrace.set_options(tid, ptrace.PTRACE_O_EXITKILL | ptrace.PTRACE_O_TRACESYSGOOD)
    ptrace.set_signal_mask(tid, ptrace.ALL_SIGNALS)


def _is_to_be_held(frozen: Frozen, tid: int, mask: int) -> bool:
    """Return whether a signal outside `mask` is pending, or one may come that must keep its place in the queue."""
    fields = status_fields(read_task_file(frozen.process, tid, "status") or b"")
    own, shared, caught = (int(fields.get(name, "0"), 16) for name in ("SigPnd", "ShdPnd", "SigCgt"))
    # A real-time signal that is queued again comes behind later ones of its number: block it before it arrives.
    return bool((own | shared) & ~mask or caught & _QUEUED)
