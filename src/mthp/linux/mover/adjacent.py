"""Move adjacent blocks together, and derive the outcome of each.

Moving a block costs the kernel a part that does not depend on its pages: a system call to move, another to drop the
moved pages, and the flushes of address translations for both. With 16 pages that is as much as the pages themselves. So
neighbours of one order become one operation of the worker, a *run*, which never crosses the range of one page table,
and so fits into the scratch area.

The worker treats a run as a block: move it away, copy it back, drop it. Each block still gets a folio of its own,
because a fault takes the largest enabled size, and no larger one is enabled. The outcome of each block stays exact: a
block of a failed run is moved once more, alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.linux.mover import stub
from mthp.linux.mover.outcome import Objection, reason_of_move, result_of_move
from mthp.ptes import Block
from mthp.results import BlockOutcome, ScanResult

_Int64s = NDArray[np.int64]


def run_lengths(addresses: _Int64s, sizes: _Int64s, reach: int) -> _Int64s:
    """Return the number of blocks in each run of neighbours of one size within a range of `reach` bytes.

    Args:
        addresses, sizes: those of the blocks, in the order in which they are moved: int64, shape (blocks,).
        reach: a multiple of every size, in bytes.

    Returns:
        int64, shape (runs,); the sum is the number of blocks.
    """
    begins = np.ones(len(addresses), np.bool_)
    begins[1:] = addresses[1:] != addresses[:-1] + sizes[:-1]
    begins[1:] |= (sizes[1:] != sizes[:-1]) | (addresses[1:] // reach != addresses[:-1] // reach)
    return np.diff(np.flatnonzero(begins), append=len(addresses))


def operations_of(addresses: _Int64s, sizes: _Int64s, lengths: _Int64s, flags: int) -> NDArray[np.void]:
    """Return an operation for each run of `lengths` blocks: :data:`~mthp.linux.mover.stub.OPERATION`, shape (runs,)."""
    firsts = np.cumsum(lengths) - lengths
    operations = stub.operations_for(addresses[firsts], sizes[firsts] * lengths, flags)
    # For a page shared after a fork the worker populates and begins again. In a run it would move blocks that it has
    # moved already: pretend that it has populated, and leave that to the second time.
    operations["populated"] = lengths > 1
    return operations


def outcomes_of(
    blocks: Sequence[Block],
    objections: Sequence[Objection | None],
    operations: NDArray[np.void],
    lengths: _Int64s,
) -> tuple[list[BlockOutcome], list[Block]]:
    """Return the outcomes of the blocks of a window, and the blocks to move again.

    Args:
        objections: reason not to move each block; the blocks without one were in the runs, in this order.
        operations: those of the runs, with their results: :data:`~mthp.linux.mover.stub.OPERATION`, shape (runs,).
        lengths: blocks in each run: int64, shape (runs,).

    Returns:
        The outcomes of those that have one, in their order; and the blocks to be moved again, each alone.
    """
    run = np.repeat(np.arange(len(lengths)), lengths)
    size = operations["length"].astype(np.int64)[run] // lengths[run]
    before = (np.arange(len(run)) - (np.cumsum(lengths) - lengths)[run]) * size
    # The kernel moves page by page and ends at the first page that it refuses: the blocks before that one are done.
    moved = np.clip(operations["moved"][run] - before, 0, size)
    error, alone = -operations["error"][run], lengths[run] == 1
    again = ~alone & (error != 0) & (moved < size)
    # An error of a run is not yet one of a block: those that were not moved are moved again, each alone.
    error[~alone] = 0
    hashed = (operations["flags"][run] & np.uint64(stub.FLAG_VERIFY) != 0) & (moved > 0)
    same = (operations["hash_before"] == operations["hash_after"])[run]
    elapsed = taken(operations["begun"], operations["ended"])[run] // lengths[run]
    rows = zip(*(column.tolist() for column in (again, error, moved, size, hashed, same, elapsed)), strict=True)
    outcomes, left = [], []
    for (address, order), objection in zip(blocks, objections, strict=True):
        if objection is not None:
            outcomes.append(BlockOutcome(address, order, objection.result, objection.reason))
            continue
        is_left, errno, moved_bytes, its_size, was_hashed, is_same, elapsed_ns = next(rows)
        if is_left:
            left.append((address, order))
            continue
        verified = is_same if was_hashed else None
        copied = (moved_bytes << order) // its_size
        outcomes.append(_outcome((address, order), errno, copied, elapsed_ns, verified))
    return outcomes, left


def _outcome(block: Block, errno: int, copied: int, elapsed_ns: int, verified: bool | None) -> BlockOutcome:
    result, reason = result_of_move(errno), reason_of_move(errno)
    if verified is False:
        result, reason = ScanResult.FAIL, "its bytes changed: end the target"
    return BlockOutcome(*block, result, reason, copied, 0, elapsed_ns, errno, verified=verified)


def taken(begun: NDArray[np.void], ended: NDArray[np.void]) -> _Int64s:
    """Return the nanoseconds between two times of each operation, 0 without one: int64, shape (operations,)."""
    first, last = stub.nanoseconds(begun), stub.nanoseconds(ended)
    return np.where((first > 0) & (last > 0), last - first, 0)
