"""Bring the stub into a stopped target for one window, and take it out again.

The target contains no code of the mover at first, so one of its threads has to make the first system calls. A tracer
could make it do so call by call, but if it died in between, the thread would keep registers that are not its own. So
code that needs no tracer makes the calls, the *boot code* (``arch/boot_*.S``). It is written, with all of the thread's
registers as data, into the padding behind the target's code (:mod:`~mthp.linux.mover.padding`); then one
PTRACE_SETREGSET sends the thread there. From then on the thread restores itself without help, and the tracer only
watches words of its memory. Before the last call, munmap, the thread waits for the tracer to write the stub, and goes
there; at the end of the window it comes back for that call. A window leaves only a private copy of that page of code.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from mthp.errors import MthpError, NotPermittedError, TargetVanishedError, UnsupportedError
from mthp.linux.abi import KCMP_FILES, kcmp, read_words
from mthp.linux.mover import stub
from mthp.linux.mover.boot import BootedThread, RemoteError
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.mapping import find_gap, query_mapping, read_mappings
from mthp.linux.mover.padding import Padding, find_padding, is_left, occupant_of
from mthp.linux.mover.steps import Step, reached
from mthp.linux.mover.tracee import Tracee

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE, MAP_FIXED_NOREPLACE = 0x02, 0x20, 0x4000, 0x100000
MADV_DONTFORK = 10
"""include/uapi/asm-generic/mman-common.h and mman.h, include/uapi/linux/mman.h."""

_Calls = NDArray[np.uint64]


@dataclass(slots=True)
class Place:
    """The room for the stub in a target; found once, and checked again in every window.

    Attributes:
        padding: the padding of its code, the largest first.
        base: a free address.
        size: free bytes at `base`.
    """

    padding: list[Padding]
    base: int
    size: int

    @classmethod
    def find(cls, frozen: FrozenProcess, size: int, alignment: int) -> Place:
        """Find room for `size` bytes.

        Raises:
            UnsupportedError: there is no room.
        """
        padding = find_padding(frozen.process, frozen.machine.slot_bytes, frozen.read)
        base = find_gap(read_mappings(frozen.process), size, alignment)
        if not base:
            raise UnsupportedError(f"process {frozen.process.label} has no free addresses for {size} bytes")
        return cls(padding, base, size)

    def slot(self, frozen: FrozenProcess) -> int:
        """Return the address of a slot that is free, or that no thread can return to.

        Raises:
            TargetVanishedError: the target executed another program.
            UnsupportedError: threads may still need all slots.
        """
        machine = frozen.machine
        pointers = frozen.stopped.registers[:, [machine.pc, machine.sp]].tolist()
        threads = [(tid, pc, stack) for tid, (pc, stack) in zip(frozen.stopped.tids, pointers, strict=True)]
        maps = frozen.process.open("maps")
        try:
            for padding in self.padding:
                # execve(2) keeps the PID; writing into another program's code would be fatal.
                if padding.mapping != query_mapping(frozen.process, maps, padding.start):
                    raise TargetVanishedError(
                        f"process {frozen.process.label} has another address space than before",
                        help="it executed a program",
                    )
                for slot in padding.slots(machine.slot_bytes):
                    content = frozen.read(slot, machine.slot_bytes)
                    occupant = occupant_of(content, machine)
                    inside = range(slot, slot + machine.slot_bytes)
                    # After a tracer's death its code stays, and a signal handler may still return to it.
                    if not any(content) or (occupant and is_left(inside, occupant, threads, frozen.read)):
                        return slot
        finally:
            os.close(maps)
        raise UnsupportedError(
            f"process {frozen.process.label}: threads may return to the code of a mover that was killed",
            help="try again later, when their signal handlers have ended",
        )


@dataclass(slots=True)
class Injection:
    """The stub in a target during a window.

    Attributes:
        layout: addresses of its parts.
        booted: the worker, the thread that mapped it and that moves the blocks.
    """

    layout: stub.Layout
    booted: BootedThread
    _frozen: FrozenProcess = field(repr=False)

    @property
    def worker(self) -> Tracee:
        """Return the thread that moves the blocks."""
        return self.booted.tracee

    def take_out(self) -> None:
        """Make the worker unmap everything, and put it back. All other threads already have their own registers.

        Raises:
            CannotStopError: the worker does not get on; later it unmaps everything and restores itself.
            OSError: ESRCH, the target was killed.
        """
        start = self.layout.header + stub.START_OFFSET
        # If the tracer was slow, the worker has unmapped everything by itself.
        with contextlib.suppress(MthpError):
            self._frozen.write(start, stub.UNMAP_ALL.to_bytes(8, sys.byteorder))
        reached(Step.UNMAPPING)
        mapped = self.layout.header + stub.MAPPED_OFFSET
        self.booted.await_that(lambda: word_at(self._frozen.process.pid, mapped) is None)
        reached(Step.UNMAPPED)
        # The only stop on the way: on a busy machine waiting for a thread to run again takes longer than all its work.
        if not self.booted.stop():
            raise TargetVanishedError(f"process {self._frozen.process.label} was killed")
        reached(Step.FETCHED)
        if self.booted.is_inside:
            self.booted.put_back()
        else:
            # It has restored itself; its present state counts.
            self._frozen.examine_again(self.worker.tid)


def word_at(pid: int, address: int) -> int | None:
    """Return the 64-bit word at `address` in the memory of `pid`; None if nothing is mapped there."""
    words = read_words(pid, np.array([address], np.uint64))
    return None if words is None else int(words[0])


def inject(frozen: FrozenProcess, place: Place, planned: stub.Layout) -> Injection:
    """Map the stub's memory in a stopped target.

    Args:
        planned: a layout without a base.

    Raises:
        UnsupportedError: the target's limits do not allow it, or it has no room.
        NotPermittedError: a security module forbids it.
        CannotStopError: it must not run injected code, or does not run.
    """
    worker = choose(frozen)
    # It may have begun to filter its system calls since all threads were checked.
    frozen.check_thread(worker.tid)
    layout = replace(planned, base=place.base)
    booted = BootedThread(frozen, worker, place.slot(frozen), _calls(frozen, layout), layout)
    mapped = layout.header + stub.MAPPED_OFFSET
    begun = False
    try:
        # From here on the thread needs no tracer: without one it unmaps everything and restores itself.
        booted.start()
        booted.await_that(lambda: word_at(frozen.process.pid, mapped) == 1)
        begun = True
    except RemoteError as error:
        # All is unmapped again: the thread waits behind its last call.
        booted.put_back()
        begun = True
        raise _explained(frozen.process.label, error) from error
    finally:
        if not begun:
            # The thread goes on without a tracer.
            frozen.abandon()
    reached(Step.MAPPED)
    return Injection(layout, booted, frozen)


def _calls(frozen: FrozenProcess, layout: stub.Layout) -> _Calls:
    numbers = frozen.machine.calls
    # The address was free when it was chosen; the target may have mapped something there since.
    flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE
    rows = (
        # Executable from the start, as PR_SET_MDWE demands; /proc/PID/mem writes the code without PROT_WRITE.
        (numbers["mmap"], layout.base, layout.size, PROT_READ | PROT_EXEC, flags, stub.NO_FD, 0),
        (numbers["mprotect"], layout.header, layout.size - layout.code_size, PROT_READ | PROT_WRITE, 0, 0, 0),
        # If the tracer dies, the target may fork before everything is unmapped.
        (numbers["madvise"], layout.base, layout.size, MADV_DONTFORK, 0, 0, 0),
        (numbers["munmap"], layout.base, layout.size, 0, 0, 0, 0),
    )
    return np.array(rows, np.uint64)


def choose(frozen: FrozenProcess) -> Tracee:
    """Return the thread that gets the boot code's registers: one outside restartable sequences, if there is one.

    It has the table of files of the first thread, which no other process shares
    (:func:`~mthp.linux.mover.refuse.sharing.new_sharer`).
    """
    pid, tracees = frozen.process.pid, list(frozen.tracees.values())
    # With other registers a thread goes on at the abort handler, and begins its sequence again.
    chosen = next((tracee for tracee in tracees if not tracee.rseq_abort), tracees[0])
    # A thread can have a table of its own (unshare(CLONE_FILES)), which another process may share and use.
    if chosen.tid != pid and kcmp(pid, chosen.tid, KCMP_FILES) not in (0, None):
        return frozen.tracees.get(pid, chosen)
    return chosen


def explain_preparation(label: str, stage: int, error: int) -> MthpError:
    """Return the exception for an errno of a stage of the worker's preparation."""
    # MADV_DONTNEED refuses locked memory (madvise_dontneed_free_valid_vma, mm/madvise.c).
    if stage == stub.EMPTY:
        return UnsupportedError(f"process {label} locks all memory that it maps", help="it called mlockall(MCL_FUTURE)")
    if stage == stub.CREATE:
        return _explained(label, OSError(error, os.strerror(error)))
    if stage == stub.HANDSHAKE:
        return UnsupportedError("this kernel cannot move pages (UFFDIO_MOVE)", help="it takes Linux 6.8 or later")
    return UnsupportedError(f"process {label}: scratch memory cannot be armed: {os.strerror(error)}")


def _explained(label: str, error: OSError) -> MthpError:
    if error.errno == errno.ESRCH:
        return TargetVanishedError(f"process {label} was killed")
    if error.errno in (errno.EPERM, errno.EACCES):
        return NotPermittedError(
            f"process {label} may not create a userfaultfd or executable memory: {error.strerror}",
            help="a security module forbids it to the target",
        )
    if error.errno == errno.ENOSYS:
        return UnsupportedError("this kernel has no userfaultfd", help="it takes CONFIG_USERFAULTFD")
    return UnsupportedError(f"process {label}: nothing can be injected: {error.strerror}")
