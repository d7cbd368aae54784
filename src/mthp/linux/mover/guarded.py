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

import contextlib
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.errors import UnsupportedError
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.mover.outcome import reason_of_move, result_of_move
from mthp.linux.mover.ownmover import BLOCKS_PER_CALL, OwnMover
from mthp.linux.mover.refuse.block import SpecialRanges, refuse_blocks, special_ranges
from mthp.linux.mover.refuse.mapping import objection_of, refuse_vma
from mthp.linux.mover.refuse.pinned import HELD, has_large_folios, split_large_folios
from mthp.linux.mover.refuse.process import refuse_process
from mthp.linux.mover.refuse.refusal import Refusal
from mthp.linux.space import ProcessSpace
from mthp.means import Means
from mthp.ptes import Block, PteColumns
from mthp.results import BlockOutcome

STACK_MARGIN = 64 << 10
"""How far from its stack pointer a thread may use its stack between being looked at and being called, in bytes."""

THREAD_MARGIN = 4096
"""How far from its robust list, in bytes, a thread's rseq area may be: C libraries keep both in one structure."""

_FOR_OTHERS = frozenset(
    {"itself", "init", "ancestor", "traced", "threads", "vfork", "uninterruptible", "shared_vm", "shared_vm_unknown"}
)
"""Refusals for processes that are to be stopped from outside. Sharers of the address space meet the guard too."""

_Int64s = NDArray[np.int64]


class OwnBlocks:
    """Moves blocks of this process to folios of their orders.

    Args:
        space: of this process.
        guarded: whether other threads may use the memory meanwhile, by themselves and in system calls. Without, nobody
            but the kernel may.
        journal: sets the size's switch for the time, if it is off; one in the usual place if not given.
    """

    def __init__(self, space: ProcessSpace, *, guarded: bool = True, journal: SwitchJournal | None = None) -> None:
        self._space = space
        self._guarded = guarded
        self._journal = journal or SwitchJournal(sysfs=space.sysfs)

    def refusals(self, means: Means) -> list[Refusal]:
        """Return all that speaks against moving memory of this process by `means` at this moment."""
        refusals = refuse_process(self._space.process, self._space, means)
        return [each for each in refusals if each.key not in _FOR_OTHERS]

    def collapse(self, blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        """Move disjoint `blocks` below the PMD order: the outcome of each, in their order.

        A block that could not be moved has its bytes as before.

        Args:
            before: the entries of the blocks, as just read.

        Raises:
            UnsupportedError: not on this machine or kernel, or not for this process; the reason is in the message.
            NotPermittedError: these rights do not suffice for the guard, or to set the switch.
        """
        if means.verify:
            raise UnsupportedError(
                "own memory cannot be verified: other threads go on writing to it", help="leave --verify out"
            )
        for refusal in self.refusals(means):
            raise UnsupportedError(f"this process cannot move its own memory: {refusal.reason}", help=refusal.remedy)
        outcomes: dict[Block, BlockOutcome] = {}
        for order in sorted({order for _, order in blocks}, reverse=True):
            addresses = np.array([address for address, its in blocks if its == order], np.int64)
            for outcome in self._move(addresses, order, before, fill=means.fill):
                outcomes[outcome.address, order] = outcome
        return [outcomes[block] for block in blocks]

    def _move(self, addresses: _Int64s, order: int, before: PteColumns, *, fill: bool) -> list[BlockOutcome]:
        """Move blocks of one order."""
        space, size = self._space, self._space.geometry.size_of(order)
        with contextlib.ExitStack() as stack:
            mover = stack.enter_context(OwnMover(size, guarded=self._guarded))
            if order not in space.switches.orders(advised=False):
                # A larger folio does not fit into the twin, so other sizes may stay on.
                stack.enter_context(self._journal.only(order, off=()))
            outcomes: list[BlockOutcome] = []
            for start in range(0, len(addresses), BLOCKS_PER_CALL):
                part = addresses[start : start + BLOCKS_PER_CALL]
                outcomes += _collapse(space, mover, part, order, before, fill=fill)
            return outcomes

    def take_pauses(self) -> list[int]:
        """Nobody is stopped."""
        return []

    def close(self) -> None:
        """Nothing is kept."""


def _collapse(
    space: ProcessSpace, mover: OwnMover, addresses: _Int64s, order: int, columns: PteColumns, *, fill: bool
) -> list[BlockOutcome]:
    """Judge the blocks at `addresses`, and move those that may be."""
    vmas = space.vmas()
    verdict = refuse_blocks(
        columns,
        None if columns.pfn is None else space.mapcounts(columns),
        addresses,
        np.full(len(addresses), order, np.int8),
        vmas=vmas,
        refuse_vma=refuse_vma,
        special=_special(space),
        page_size=space.geometry.page_size,
        fill=fill,
    )
    held = np.zeros(len(addresses), np.bool_)
    if has_large_folios(columns):
        # UFFDIO_MOVE does not return on some kernels while such a folio is held (see `held`), and threads would wait.
        left = split_large_folios(space, [(address, order) for address in addresses[verdict == 0].tolist()])
        held = np.isin(addresses, [address for address, _ in left])
    begin = time.perf_counter_ns()
    errors = mover.move(addresses[(verdict == 0) & ~held], fill=fill)
    elapsed = (time.perf_counter_ns() - begin) // max(1, len(errors))
    outcomes = []
    moved = iter(errors.tolist())
    for address, why, kept in zip(addresses.tolist(), verdict.tolist(), held.tolist(), strict=True):
        if why or kept:
            outcomes.append(BlockOutcome(address, order, *(objection_of(why, vmas, address) if why else HELD)))
        else:
            error = next(moved)
            result, reason = result_of_move(error), reason_of_move(error)
            outcomes.append(BlockOutcome(address, order, result, reason, elapsed_ns=elapsed, errno=error))
    return outcomes


def _special(space: ProcessSpace) -> SpecialRanges:
    """What threads of this process use without a fault that could wait, with a margin."""
    found = special_ranges(space.process)
    return SpecialRanges(
        robust_lists=tuple((start - THREAD_MARGIN, end + THREAD_MARGIN) for start, end in found.robust_lists),
        stacks=tuple((start - STACK_MARGIN, end + STACK_MARGIN) for start, end in found.stacks),
    )
