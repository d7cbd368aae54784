"""Have a thread make its interrupted system call again, before any signal reaches it.

Where a signal interrupts a system call, it depends on the call and on the signal's handler whether the call is made
again or returns EINTR. The kernel decides that when it delivers the signal. On x86-64 what it has to know for that is
in the registers, and is put back with them. On aarch64 it is known to one visit to the kernel alone: a thread that
stopped in a call is rewound to the call's instruction, and the kernel keeps to itself that there was one (do_signal,
arch/arm64/kernel/signal.c). Threads that stand still for the whole window do not leave that visit. But the one that ran
our code has: if it were let go with a signal pending, it would run the handler as if it had not been waiting, and then
begin to wait. Whoever waits for that very signal, in pause(2) or in a read(2) with an alarm, would do so for ever.

So such a thread, back at its instruction, is led into the call first, and is let go at its entry. From there on all is
the kernel's matter again. Signals that are pending are blocked on the way; one that comes on the way shows itself by a
stop before its delivery, and goes back to where it came from as soon as it is blocked (ptrace_signal, kernel/signal.c).
While they are blocked for our sake, our death would leave them so. So for this short time PTRACE_O_EXITKILL is set, as
it is while the code is brought in; without a signal it is not. But a real-time signal that goes back does so behind
those of its number that came right after it. So of programs that handle such signals they are blocked from the first.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from typing import Protocol

from mthp.errors import MthpError
from mthp.linux.mover import ptrace
from mthp.linux.mover.arch.machine import Machine
from mthp.linux.mover.taskfiles import read_task_file
from mthp.linux.mover.tracee import State, Tracee
from mthp.linux.process import Process
from mthp.text import lines

TIMEOUT_NS = 10_000_000_000
"""How long a thread may take to get to its call. Only a busy machine, or a frozen cgroup, delays it."""

SYSCALL_STOP = signal.SIGTRAP | 0x80
"""The stop at a system call, with PTRACE_O_TRACESYSGOOD."""

_SIGNAL_SETS = (b"SigPnd:", b"ShdPnd:", b"SigCgt:")
_QUEUED = ptrace.ALL_SIGNALS & -(1 << 33)
"""Real-time signals, from 34 on: the two before are the C library's own, and carry nothing (nptl(7))."""

_POLL_SECONDS = 5e-6


class Frozen(Protocol):
    """What is needed here of :class:`~mthp.linux.mover.freeze.FrozenProcess`."""

    @property
    def process(self) -> Process: ...
    @property
    def machine(self) -> Machine: ...
    @property
    def tracees(self) -> Mapping[int, Tracee]: ...
    def read(self, address: int, size: int, /) -> bytes: ...
    def poll(self, tid: int, /) -> int | None: ...
    def has_exited(self, tid: int, /) -> bool: ...
    def stop_again(self, tid: int, /) -> bool: ...


def before_calls(frozen: Frozen) -> list[int]:
    """Return the restored threads whose interrupted system call the kernel has forgotten."""
    returned = [tid for tid, tracee in frozen.tracees.items() if tracee.state is State.RETURNED]
    return [tid for tid in returned if _is_before_call(frozen, tid)]


def _is_before_call(frozen: Frozen, tid: int) -> bool:
    machine = frozen.machine
    if not machine.forgets_calls:
        return False
    try:
        return frozen.read(int(frozen.tracees[tid].home[0, machine.pc]), len(machine.syscall)) == machine.syscall
    except MthpError:
        return False  # The thread has nothing there to run.


def make_again(frozen: Frozen, tid: int) -> None:
    """Lead a stopped thread that has its own registers again into the system call before which it stands; let it go.

    Raises:
        OSError: ESRCH if it was killed.
        CannotStopError: it neither runs nor stops.
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
    """Block all signals of a stopped thread; if we die before they are let go, so does the target."""
    ptrace.set_options(tid, ptrace.PTRACE_O_EXITKILL | ptrace.PTRACE_O_TRACESYSGOOD)
    ptrace.set_signal_mask(tid, ptrace.ALL_SIGNALS)


def _is_to_be_held(frozen: Frozen, tid: int, mask: int) -> bool:
    """Whether a signal is pending that is not in `mask`, or may come whose place in its queue matters."""
    text = read_task_file(frozen.process, tid, "status") or b""
    fields = {line[:7]: int(line[7:], 16) for line in lines(text) if line[:7] in _SIGNAL_SETS}
    pending = fields.get(b"SigPnd:", 0) | fields.get(b"ShdPnd:", 0)
    return bool(pending & ~mask or fields.get(b"SigCgt:", 0) & _QUEUED)
