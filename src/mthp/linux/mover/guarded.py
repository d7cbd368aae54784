"""Moves memory of this very process into folios of a wanted order, while its other threads go on using it.

No thread is stopped and nothing is traced. Instead a userfaultfd stands guard: whoever touches a page that is away
waits in its page fault, and goes on when the page is back. For each block, one after another:

1. Register the block with the userfaultfd (MISSING), which makes it a mapping of its own for the moment.
2. UFFDIO_MOVE takes its pages away into a scratch area. From here on a touch waits. The kernel refuses what is pinned
   or shared; then what was moved is moved back, and the block stays as it was.
3. mremap(MREMAP_DONTUNMAP) makes an empty twin of the block's mapping at another address, which nobody knows. Why not
   fill the block itself? Because UFFDIO_COPY and UFFDIO_MOVE put in single pages, and an ordinary fault would wait for
   ourselves.
4. Copying the bytes into the twin faults in one folio. The twin is a mapping of exactly the block's size, so a larger
   folio does not fit; a smaller one comes if memory is short. Its size must be on: a switch of the system, for which
   there is a journal (:mod:`~mthp.linux.journal`).
5. mremap puts the twin in the block's place, folio and all, in one step for everybody else. The kernel then makes one
   mapping again of it and its neighbours, since it has their flags, their anon_vma and their offsets.
6. Those that waited are woken, and find the page.

The hard part is who does this. Not Python: another thread may hold the interpreter's lock while it waits for the
block, and whoever moves the block would then wait for that lock for ever. And the block may hold anything: objects of
the interpreter, or the very list of blocks. So steps 1 to 6 are done by a hundred and fifty instructions of machine
code (``guarded_x86_64.S``, kept as bytes in `ownmover`), called through ctypes, which gives the lock away for the time
of the call. They touch nothing but registers, the stack and memory made for them. What the calling thread itself would
touch without asking is refused beforehand: a block with its stack, its robust list or its rseq area. Signals are held
back in this thread, so that no handler runs in between.

What remains visible:

- A system call of another thread that uses the block's memory waits too. That takes a userfaultfd that sees faults in
  the kernel, which unprivileged users have only with CAP_SYS_PTRACE or ``vm.unprivileged_userfaultfd=1``. Without the
  *guard* (``guarded=False``) a userfaultfd for faults in user mode is enough, and such a call would fail with EFAULT:
  then nobody else may use the memory meanwhile.
- A child forked in the middle would find the block empty. ``os.fork`` waits for us; C code that forks without Python
  must not do so meanwhile. Starting programs (vfork, posix_spawn) is no matter.
- Folios of the PMD order are left to MADV_COLLAPSE, which locks others out in the kernel.
- vmsplice(2) and other references that do not pin a page cannot be seen, as everywhere in the mover.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np

from mthp.closing import Closing
from mthp.errors import UnsupportedError
from mthp.geometry import Geometry
from mthp.linux.mover.outcome import reason_of_move, result_of_move
from mthp.linux.mover.ownmover import BLOCKS_PER_CALL, OwnMover
from mthp.linux.mover.recheck import Before
from mthp.linux.mover.refuse.block import SpecialRanges
from mthp.means import Means
from mthp.movechecks import Refusal
from mthp.ptes import Block
from mthp.results import BlockOutcome

STACK_MARGIN = 64 << 10
"""How far from its stack pointer a thread may use its stack between the check and the call, in bytes."""

THREAD_MARGIN = 4096
"""How far from its robust list, in bytes, a thread's rseq area may be: C libraries keep both in one structure."""


class Guard(Closing):
    """Holds blocks of this process: threads that touch them wait (:class:`~mthp.linux.mover.mover.Hold`).

    Args:
        geometry: of this machine.
        guarded: whether other threads may use the memory meanwhile, by themselves and in system calls. Without, only
            the kernel may.
    """

    waived = frozenset(
        {
            "itself",
            "init",
            "ancestor",
            "traced",
            "threads",
            "vfork",
            "uninterruptible",
            "shared_vm",
            "shared_vm_unknown",
        }
    )
    """Refusals of processes that are stopped from outside. Sharers of the address space meet the guard too."""

    checks_again = False

    def __init__(self, geometry: Geometry, *, guarded: bool = True) -> None:
        self._geometry = geometry
        self._guarded = guarded
        self._mover: OwnMover | None = None

    def admit(self, means: Means, refusals: Sequence[Refusal]) -> None:
        """Refuse what is refused for all blocks: the program that calls us had better know."""
        if means.verify:
            raise UnsupportedError(
                "own memory cannot be verified: other threads go on writing to it", help="leave --verify out"
            )
        for refusal in refusals:
            raise UnsupportedError(f"this process cannot move its own memory: {refusal.reason}", help=refusal.remedy)

    def too_large(self, order: int) -> range:
        """Return none: a larger folio does not fit into the twin."""
        return range(order, order)

    def around(self, special: SpecialRanges) -> SpecialRanges:
        """Return what threads use without a fault that could wait, with a margin."""
        return SpecialRanges(
            robust_lists=tuple((start - THREAD_MARGIN, end + THREAD_MARGIN) for start, end in special.robust_lists),
            stacks=tuple((start - STACK_MARGIN, end + STACK_MARGIN) for start, end in special.stacks),
        )

    def ready(self, order: int) -> OwnMover:
        """Return the code and its userfaultfd, to be closed afterwards.

        Raises:
            UnsupportedError: not on this machine or kernel; the reason is in the message.
            NotPermittedError: these rights do not suffice for the guard.
        """
        self._mover = OwnMover(self._geometry.size_of(order), guarded=self._guarded)
        return self._mover

    def windows(self, blocks: Sequence[Block], means: Means, _before: Before) -> Iterator[list[BlockOutcome]]:
        """Move as many blocks at a time as one call takes. A block that could not be moved has its bytes as before."""
        assert self._mover is not None
        for start in range(0, len(blocks), BLOCKS_PER_CALL):
            part = blocks[start : start + BLOCKS_PER_CALL]
            begin = time.perf_counter_ns()
            errors = self._mover.move(np.array([address for address, _ in part], np.int64), fill=means.fill).tolist()
            elapsed = (time.perf_counter_ns() - begin) // len(part)
            yield [
                BlockOutcome(*block, result_of_move(error), reason_of_move(error), elapsed_ns=elapsed, errno=error)
                for block, error in zip(part, errors, strict=True)
            ]

    def take_pauses(self) -> list[int]:
        """Return none: no thread is stopped."""
        return []

    def close(self) -> None:
        """Do nothing: nothing is kept between two orders."""
