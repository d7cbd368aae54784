"""Run the boot code in a thread of a stopped target, and watch it.

The boot code makes the system calls that map and unmap the stub's memory; :mod:`~mthp.linux.mover.inject` explains it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from mthp.errors import TargetVanishedError
from mthp.linux.mover import ptrace, stub
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.padding import pack_slot
from mthp.linux.mover.steps import Step, reached
from mthp.linux.mover.tracee import CannotStopError, Tracee, TraceeState

CALLS = 4
"""Rows of the boot code's table of calls; the last row is made alone, at the end."""

_CALL_BYTES = 56
_FIRST_ERROR = (1 << 64) - 4095
_POLL_SECONDS = 5e-6
_LONGEST_POLL_SECONDS = 250e-6

IMPATIENCE_NS = 20_000_000
"""Nanoseconds after which a thread that reports no result is stopped, to see whether a call failed."""

_Calls = NDArray[np.uint64]


class RemoteError(OSError):
    """A system call that the target made for the mover failed."""


class BootedThread:
    """A thread of a stopped target that runs the boot code. Methods raise OSError with ESRCH if it was killed.

    Args:
        slot: address of the padding that it runs in.
        calls: number and six arguments of each call: uint64, shape (CALLS, 7).
        layout: the stub's layout; None to make only the calls, all but the last.
    """

    def __init__(
        self, frozen: FrozenProcess, tracee: Tracee, slot: int, calls: _Calls, layout: stub.Layout | None
    ) -> None:
        self.tracee = tracee
        self._frozen = frozen
        self._machine = frozen.machine
        self._slot = slot
        mask = int(tracee.stopped.masks[tracee.row])
        stub_at = (layout.header, layout.context(tracee.row), layout.base) if layout else (0, 0, 0)
        boot = self._machine.pack_boot(tracee.tid, tracee.home, mask, stub_at, calls)
        frozen.write(slot, pack_slot(boot, tracee.tid, self._machine.slot_bytes))
        reached(Step.LOADED)

    @property
    def unmap(self) -> int:
        """Return the address of the code that makes the last call."""
        return self._slot + self._machine.boot_unmap

    def start(self) -> None:
        """Start the thread. It blocks all signals itself, in case the tracer dies before it can do so."""
        self._jump(self._machine.boot_entry)
        reached(Step.BOOTED)
        # If the tracer dies before this line, the code blocks the signals itself from its first instruction on.
        ptrace.set_signal_mask(self.tracee.tid, ptrace.ALL_SIGNALS)
        # The mask is set now: skip the code's own call for it.
        self._jump(self._machine.boot_begin)
        self.tracee.state = TraceeState.RUNNING
        ptrace.cont(self.tracee.tid)

    def _jump(self, offset: int) -> None:
        self.tracee.borrow()
        nothing = np.zeros(1, np.uint64)
        registers = self._machine.parked(self.tracee.home, nothing, self._slot + offset, 0)
        ptrace.set_registers(self.tracee.tid, registers)

    def await_that(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition` holds, while the thread runs (:func:`await_worker`).

        Raises:
            RemoteError: a call failed; the thread is stopped.
        """
        begun = time.monotonic_ns()
        impatient = begun + IMPATIENCE_NS

        def holds() -> bool:
            nonlocal impatient
            if condition():
                return True
            # Stopping the thread costs it time, so it is done rarely, and ever more rarely.
            if (now := time.monotonic_ns()) > impatient:
                impatient = now + 4 * (now - begun)
                self._look_for_error()
            return False

        await_worker(self._frozen, self.tracee.tid, holds, _POLL_SECONDS)

    def _look_for_error(self) -> None:
        if not self.stop():
            return
        error = self._register(self._machine.boot_error)
        # If the first call failed, there is nothing to undo; otherwise the last one undoes it, and must be over.
        if self.is_inside and error >= _FIRST_ERROR and self._calls_made() in (0, CALLS):
            raise RemoteError((1 << 64) - error, os.strerror((1 << 64) - error))
        ptrace.cont(self.tracee.tid)

    def stop(self) -> bool:
        """Stop the thread; return False if the target was killed.

        Raises:
            CannotStopError: the thread does not stop.
        """
        return self._frozen.stop_again(self.tracee.tid)

    @property
    def is_inside(self) -> bool:
        """Return whether the thread, which is stopped, is still in the boot code."""
        return self._slot <= self._register(self._machine.pc) < self._slot + self._machine.slot_bytes

    @property
    def has_made_calls(self) -> bool:
        """Return whether the thread, which is stopped, has made all calls but the last."""
        # Before the boot code's first instruction the register still holds the thread's own value.
        return self.is_inside and self._calls_made() in (CALLS - 1, CALLS)

    def _calls_made(self) -> int:
        row = self._register(self._machine.boot_row)
        return (row - self._slot - self._machine.boot_rows) // _CALL_BYTES

    def _register(self, column: int) -> int:
        return int(ptrace.get_registers(self.tracee.tid, self._machine.words)[0, column])

    def put_back(self) -> None:
        """Restore the thread, which is stopped, exactly, and make the padding zero again."""
        self.tracee.put_back()
        # Last, because the thread was inside until its registers were its own.
        self._frozen.write(self._slot, bytes(self._machine.slot_bytes))


def await_worker(frozen: FrozenProcess, tid: int, condition: Callable[[], bool], poll_seconds: float) -> None:
    """Wait until `condition` holds, while the thread `tid` runs injected code.

    Args:
        condition: checked again after `poll_seconds`, and less and less often.

    Raises:
        CannotStopError: the thread does not run.
    """
    begun = time.monotonic_ns()
    while not condition():
        waited = time.monotonic_ns() - begun
        if (stop := frozen.poll(tid)) is not None:
            # SIGSTOP and group stops are passed on. A fault of the thread's own kills the target, as without the mover.
            frozen.resume(tid, stop)
        elif frozen.has_exited(tid):
            raise TargetVanishedError(f"process {frozen.process.label} was killed")
        elif waited > frozen.worker_timeout_ns:
            raise CannotStopError(
                f"thread {tid} of process {frozen.process.label} does not run",
                help="its cgroup is frozen, or leaves it no time; once it runs, it restores itself",
            )
        else:
            # Bounded: a signal may have stopped the thread, and all others wait until this loop resumes it.
            time.sleep(min(poll_seconds + waited * 1e-9 / 8, _LONGEST_POLL_SECONDS))
