"""The threads of a stopped target, in columns: attach, examine, park, put back and detach them.

Each request for all threads is one table of system calls (:mod:`~mthp.linux.mover.callbatches`), made for the first
window and used again in every later window with the same threads.

Two effects of a stop on a thread are repaired here: an EINTR that only the stop caused (:meth:`Stopped.examine`), and a
restartable sequence that it interrupted (:meth:`Stopped.settle`).
"""

from __future__ import annotations

import enum
import errno
import os
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.errors import UnsupportedError
from mthp.linux.mover import ptrace, steps
from mthp.linux.mover.arch.architecture import Architecture, Registers
from mthp.linux.mover.callbatches import Calls
from mthp.linux.mover.steps import Step, reached
from mthp.linux.mover.targetmemory import Reader

WordReader = Callable[[NDArray[np.uint64]], NDArray[np.uint64]]
"""Returns the 64-bit words at many addresses of the target's memory."""

WALL = 0x40000000
"""__WALL of wait(2): threads as well as processes."""

_SIGINFO_WORDS = 16
_SIGINFO_STATUS = 6
"""Index of ``si_status`` among the 32-bit words of ``siginfo_t`` with 64-bit pointers."""

_RSEQ_CS_OFFSET = 8
_RSEQ_CS = "=IIQQQ"


class CannotStopError(UnsupportedError):
    """The threads of the target could not be stopped, or must not be; all were released."""


class Stopped:
    """Threads that are stopped together. Methods raise OSError with ESRCH if one was killed.

    Args:
        tids: numbers of the threads; at least one.

    Attributes:
        inner_tids: their numbers in the PID namespace of their process; empty until they are first needed.
        registers: those of the stop, after the repair of an EINTR that only the stop caused: uint64, shape
            (threads, words).
        masks: their blocked signals; where a system call replaced them temporarily, those that it will restore: uint64,
            shape (threads,).
        rseq_areas: addresses of their ``struct rseq``, or 0: uint64, shape (threads,).
        rseq_aborts: address of the abort handler of the restartable sequence that the thread is in, where it goes on if
            its registers are changed; otherwise 0: uint64, shape (threads,).
        homes: registers to go on with once others were set: those of the stop, or at the sequence's abort handler.
    """

    def __init__(self, machine: Architecture, tids: list[int]) -> None:
        self.machine = machine
        self.tids = tids
        self.inner_tids: list[int] = []
        threads = len(tids)
        self.registers, self.homes, self._parked = (np.zeros((threads, machine.words), np.uint64) for _ in range(3))
        self.masks = np.zeros(threads, np.uint64)
        self._all_signals = np.array([ptrace.ALL_SIGNALS], np.uint64)
        self._rseq = np.zeros((threads, ptrace.RSEQ_CONFIGURATION_WORDS), np.uint64)
        self._dispatch = np.zeros((threads, ptrace.DISPATCH_CONFIGURATION_WORDS), np.uint64)
        self._siginfos = np.zeros((threads, _SIGINFO_WORDS), np.uint64)
        self.rseq_areas = self._rseq[:, 0]
        self.rseq_aborts = np.zeros(threads, np.uint64)
        self._numbers = np.array(tids, np.uint64)
        self._vectors = [ptrace.vectors(array) for array in (self.registers, self.homes, self._parked)]
        self._make_tables()

    def _make_tables(self) -> None:
        at, sigset = ptrace.addresses_of, ptrace.SIGSET_BYTES
        registers, homes, parked = map(at, self._vectors)
        # PTRACE_SEIZE does not stop, unlike PTRACE_ATTACH, and sends no SIGSTOP that the target could notice.
        self._attach = self._table((ptrace.PTRACE_SEIZE, 0, 0), (ptrace.PTRACE_INTERRUPT, 0, 0))
        self._look = self._table(
            (ptrace.PTRACE_GETREGSET, ptrace.NT_PRSTATUS, registers),
            (ptrace.PTRACE_GETSIGMASK, sigset, at(self.masks)),
            (ptrace.PTRACE_GET_RSEQ_CONFIGURATION, self._rseq.strides[0], at(self._rseq)),
            (ptrace.PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, self._dispatch.strides[0], at(self._dispatch)),
        )
        self._park = self._table(
            (ptrace.PTRACE_SETREGSET, ptrace.NT_PRSTATUS, parked),
            (ptrace.PTRACE_SETSIGMASK, sigset, ptrace.address_of(self._all_signals)),
        )
        self._restore = self._table(
            (ptrace.PTRACE_SETSIGMASK, sigset, at(self.masks)),
            (ptrace.PTRACE_SETREGSET, ptrace.NT_PRSTATUS, homes),
        )
        self._detach = self._table((ptrace.PTRACE_DETACH, 0, 0))
        self._wait = Calls(len(self.tids))
        self._wait.table[:, 0], self._wait.table[:, 1] = self.machine.calls["waitid"], os.P_PID
        self._wait.table[:, 2], self._wait.table[:, 3] = self._numbers, at(self._siginfos)
        # Where there is nothing to report the kernel writes a status of 0 (waitid, kernel/exit.c), over the last one.
        self._wait.table[:, 4] = os.WSTOPPED | os.WNOHANG | WALL

    def _table(self, *requests: tuple[int, int, int | NDArray[np.uint64]]) -> Calls:
        """Return a table of ptrace requests, each for all threads, one after the other, with their address and data."""
        threads = len(self.tids)
        calls = Calls(threads * len(requests))
        calls.table[:, 0] = self.machine.calls["ptrace"]
        for part, (request, address, data) in enumerate(requests):
            rows = calls.table[part * threads : (part + 1) * threads]
            rows[:, 1], rows[:, 2], rows[:, 3], rows[:, 4] = request, self._numbers, address, data
        return calls

    @classmethod
    def joined(cls, parts: Sequence[Stopped]) -> Stopped:
        """Return one of several; there is at least one."""
        if len(parts) == 1:
            return parts[0]
        whole = cls(parts[0].machine, [tid for part in parts for tid in part.tids])
        for name in ("registers", "homes", "masks", "_rseq", "rseq_aborts"):
            getattr(whole, name)[:] = np.concatenate([getattr(part, name) for part in parts])
        return whole

    def attach(self) -> dict[int, int]:
        """Seize all threads, and request a stop of each; return the errno for those that could not be seized."""
        self._attach.run()
        # Those of the first request: a thread that was not seized fails the second one, too.
        results = self._attach.results[: len(self.tids)]
        return {self.tids[row]: -int(results[row]) for row in np.flatnonzero(results)} if results.any() else {}

    def wait(self) -> list[int]:
        """Return each thread's unreported stop: signal | event << 8; 0 if there is none."""
        self._wait.run()
        stops: list[int] = self._siginfos.view(np.int32)[:, _SIGINFO_STATUS].tolist()
        return stops

    def examine(self, label: str, read: Reader, read_words: WordReader) -> None:
        """Read the state of threads that have just stopped and run code of their own; repair their EINTR.

        Raises:
            CannotStopError: one must not run injected code.
        """
        threads, machine = len(self.tids), self.machine
        # Old values must not pass for new results.
        self._rseq[:], self._dispatch[:], self._vectors[0][:, 1] = 0, 0, self.registers.strides[0]
        # PTRACE_GETREGSET puts the length of the set into the vector: less for 32-bit registers (ptrace_regset).
        self._look.run()
        if (self._look.results < 0).any():
            # The kernel may lack rseq and the dispatching of system calls.
            self._check(self._look, 2 * threads)
            self._check(self._look, 4 * threads, allowed=(errno.EIO, errno.EINVAL))
        short = self._vectors[0][:, 1] != self.registers.strides[0]
        # Threads without a user program counter (copy_thread, arch/*/kernel/process.c) work for io_uring or vhost.
        if (kernels := ~short & (self.registers[:, machine.pc] == 0)).any():
            raise CannotStopError(
                f"process {label}: thread {self.tids[int(kernels.argmax())]} is the kernel's, and may hold its pages"
            )
        if (foreign := short | machine.foreign(self.registers)).any():
            raise CannotStopError(
                f"process {label}: thread {self.tids[int(foreign.argmax())]} does not run 64-bit code"
            )
        # Each call of the stub would end in the program's handler for SIGSYS.
        if self._dispatch[:, 0].any():
            raise CannotStopError(
                f"process {label}: thread {self.tids[int(self._dispatch[:, 0].argmax())]} intercepts its system calls",
                help="prctl(PR_SET_SYSCALL_USER_DISPATCH), as Wine uses it, does not go together with the mover",
            )
        if reason := machine.refuse_extended(self.tids):
            raise CannotStopError(f"process {label}: {reason}", help="try again later")
        # Some calls return EINTR for the stop itself, where the kernel restarts others. (A read or write that has
        # transferred a part returns that part, as after SIGSTOP and SIGCONT: that cannot be repaired.)
        for row in np.flatnonzero(machine.repair(self.registers)).tolist():
            ptrace.set_registers(self.tids[row], self.registers[row : row + 1])
        self.rseq_aborts[:] = rseq_aborts(self, read, read_words)
        self.settle()

    def settle(self) -> None:
        """Fill in :attr:`homes`."""
        self.homes[:] = self.registers
        aborted = self.rseq_aborts != 0
        # On its way back to user mode the kernel would send the thread to the abort handler of its sequence (rseq(2));
        # but it forgets the sequence if the registers are changed first, and the thread would go on in the middle.
        if aborted.any():
            changed = self.homes[aborted]
            changed[:, self.machine.pc] = self.rseq_aborts[aborted]
            self.machine.leave_call(changed)
            self.homes[aborted] = changed

    def park(self, registers: Registers, but: int) -> None:
        """Set the registers of all threads but the one in row `but`, and only then have them block all signals."""
        self._parked[:] = registers
        self._park.results[:] = 0
        # In between a thread may run a handler, but within the loop, which blocks the signals itself. The other way
        # round it would run its own code with all signals blocked if the tracer died.
        for part, step in enumerate((Step.PARKED_UNMASKED, Step.PARKED)):
            self._run(self._park, part, step, range(but))
            self._run(self._park, part, step, range(but + 1, len(self.tids)))
        self._check(self._park, len(self._park.table))

    def put_back(self, but: int) -> list[int]:
        """Restore masks and registers of all threads but the one in row `but`; return those that were killed."""
        # Masks come first, because a thread that may run handlers then still runs only harmless code.
        self._restore.results[:] = 0
        for part, step in enumerate((None, Step.UNPARKED)):
            self._run(self._restore, part, step, range(but))
            self._run(self._restore, part, step, range(but + 1, len(self.tids)))
        return self._killed(self._restore)

    def detach(self) -> list[int]:
        """Release all; return those that were killed meanwhile."""
        self._run(self._detach, 0, Step.RELEASED)
        return self._killed(self._detach)

    def _run(self, calls: Calls, part: int, step: Step | None, rows: range | None = None) -> None:
        """Make one request of all threads, or of those in `rows`; report `step`, if there is one, for each of them."""
        rows = range(len(self.tids)) if rows is None else rows
        first = part * len(self.tids) + rows.start
        if step is None or not steps.is_observed():
            calls.run(first, len(rows))
        else:
            calls.run_each(first, len(rows), lambda: reached(step))

    def _check(self, calls: Calls, rows: int, allowed: Sequence[int] = ()) -> None:
        """Do nothing if the first `rows` of `calls` have succeeded, or failed with an `allowed` errno.

        Raises:
            OSError: one has failed with another errno.
        """
        for row in np.flatnonzero(calls.results[:rows] < 0).tolist():
            error = -int(calls.results[row])
            if error not in allowed:
                raise ptrace.failure(int(calls.table[row, 1]), int(calls.table[row, 2]), error)

    def _killed(self, calls: Calls) -> list[int]:
        rows = np.flatnonzero(calls.results < 0).tolist()
        if not rows:
            return []
        self._check(calls, len(calls.table), allowed=(errno.ESRCH,))
        return list(dict.fromkeys(self.tids[row % len(self.tids)] for row in rows))


# Integers, because they are hashed several times for each thread while all are stopped, and an Enum hashes its name.
class TraceeState(enum.IntEnum):
    """State of a thread of the target, as far as the tracer has brought it.

    The permitted transitions; from each state also to DEAD, and to SEIZED if it was killed and has not gone yet::

        SEIZED --stops--> STOPPED --borrow--> BORROWED --runs--> RUNNING --put back--> RETURNED
                             ^--------put back--'                   `--restored itself--> STOPPED
    """

    SEIZED = enum.auto()
    """It is traced, and has not stopped yet."""
    STOPPED = enum.auto()
    """It has registers of its own, in the stop in which it was found."""
    BORROWED = enum.auto()
    """It has borrowed registers or a borrowed mask, in that same stop."""
    RUNNING = enum.auto()
    """It runs injected code, or is stopped in it."""
    RETURNED = enum.auto()
    """It has its own registers again, in another stop: the kernel may have forgotten its system call
    (:mod:`~mthp.linux.mover.reentry`)."""
    DEAD = enum.auto()
    """It has exited."""


BORROWED_STATES = frozenset({TraceeState.BORROWED, TraceeState.RUNNING})
"""States from which a thread has to be put back."""

STANDING = BORROWED_STATES | {TraceeState.STOPPED, TraceeState.RETURNED}
"""States of a thread that the tracer has stopped, and has to release."""


@dataclass(slots=True, eq=False)
class Tracee:
    """One thread of the target.

    Attributes:
        row: its row in `stopped`.
    """

    tid: int
    state: TraceeState = TraceeState.SEIZED
    row: int = 0
    _stopped: Stopped | None = None

    def place(self, stopped: Stopped, row: int) -> None:
        """Record the columns and the row that belong to this thread."""
        self._stopped, self.row = stopped, row

    def has_stopped(self) -> None:
        """Record a requested stop; a thread that runs injected code keeps its state."""
        if self.state is TraceeState.SEIZED:
            self.state = TraceeState.STOPPED

    def borrow(self) -> None:
        """Record that it is about to get borrowed registers or a borrowed mask."""
        if self.state is TraceeState.STOPPED:
            self.state = TraceeState.BORROWED

    def is_put_back(self) -> None:
        """Record that registers and mask are its own again."""
        if self.state in BORROWED_STATES:
            self.state = TraceeState.RETURNED if self.state is TraceeState.RUNNING else TraceeState.STOPPED

    @property
    def stopped(self) -> Stopped:
        """Return the columns of it and of the threads that were stopped with it."""
        assert self._stopped is not None
        return self._stopped

    @property
    def rseq_abort(self) -> int:
        """Return the address where it goes on if its registers are changed, 0 if where it stopped."""
        return int(self.stopped.rseq_aborts[self.row])

    @property
    def home(self) -> Registers:
        """Return the registers to go on with once others were set: uint64, shape (1, words)."""
        return self.stopped.homes[self.row : self.row + 1]

    def put_back(self) -> None:
        """Restore mask and registers, as :meth:`Stopped.put_back` does for all; OSError with ESRCH if it was killed."""
        ptrace.set_signal_mask(self.tid, int(self.stopped.masks[self.row]))
        ptrace.set_registers(self.tid, self.home)
        self.is_put_back()


def rseq_aborts(stopped: Stopped, read: Reader, read_words: WordReader) -> NDArray[np.uint64]:
    """Return the abort handler of each thread's restartable sequence, 0 if none: uint64, shape (threads,).

    The layout is that of include/uapi/linux/rseq.h. A sequence contains no system call, so a thread in one is in none.
    """
    aborts = np.zeros(len(stopped.tids), np.uint64)
    rows = np.flatnonzero((stopped.rseq_areas != 0) & ~stopped.machine.in_call(stopped.registers))
    if len(rows):
        sequences = read_words(stopped.rseq_areas[rows] + np.uint64(_RSEQ_CS_OFFSET))
        for row, sequence in zip(rows[sequences != 0].tolist(), sequences[sequences != 0].tolist(), strict=True):
            _, _, start, length, abort = struct.unpack(_RSEQ_CS, read(sequence, struct.calcsize(_RSEQ_CS)))
            if start <= int(stopped.registers[row, stopped.machine.pc]) < start + length:
                aborts[row] = abort
    return aborts
