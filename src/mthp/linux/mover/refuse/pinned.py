"""Find large folios that are held, by splitting them before the stop.

UFFDIO_MOVE splits the large folios that it meets. Where one is held (a pin, a page in a pipe) the split fails, and some
kernels then repeat it until the holder is gone (move_pages, mm/userfaultfd.c; seen on 6.12, 7.0 and 7.2, while 6.18 and
7.3 return EBUSY). All threads of the target would be stopped meanwhile, perhaps with the one that has to release the
folio. No interface shows which pages are held.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.linux import abi
from mthp.linux.mover.movetarget import MoveTarget
from mthp.linux.mover.outcome import Objection
from mthp.ptes import Block, Pte, PteColumns, Segment
from mthp.results import ScanResult

HELD = Objection(
    ScanResult.PAGE_COUNT, "it has a large folio that cannot be split: it is pinned, or referenced from elsewhere"
)


def has_large_folios(columns: PteColumns) -> bool:
    """Return whether a large folio is among the pages, as far as frames can be seen."""
    return columns.pfn is not None and bool(_large(columns).any())


def split_large_folios(target: MoveTarget, blocks: Sequence[Block]) -> list[Block]:
    """Split the large folios that `blocks` lie in; return the blocks that still have one.

    Args:
        target: the process; it need not be stopped.
        blocks: disjoint, ascending.
    """
    size = target.geometry.page_size
    counts = np.array([1 << order for _, order in blocks], np.int64)
    begins = np.cumsum(counts) - counts
    starts = np.array([address for address, _ in blocks], np.int64)
    pages = np.repeat(starts - begins * size, counts) + np.arange(counts.sum()) * size
    segments: list[Segment] = [(address, address + target.geometry.size_of(order)) for address, order in blocks]
    columns = target.read(segments)
    rows = np.flatnonzero(_large(columns))
    if columns.pfn is None or not len(rows):
        return []
    # A folio of order n begins at a frame that is a multiple of 2^n.
    shifts = columns.folio_order[rows].astype(np.uint64)
    _, firsts = np.unique(columns.pfn[rows] >> shifts << shifts, return_index=True)
    for page in pages[rows[firsts]].tolist():
        # Over a part of a large folio it splits the folio, and leaves it as it is if that fails
        # (madvise_cold_or_pageout_pte_range, mm/madvise.c).
        abi.process_madvise(target.process.pidfd, page, size, abi.MADV_COLD)
    left = np.logical_or.reduceat(_large(target.read(segments)), begins)
    return [block for block, is_left in zip(blocks, left.tolist(), strict=True) if is_left]


def _large(columns: PteColumns) -> NDArray[np.bool_]:
    """Return which pages belong to a large folio."""
    mapped = (columns.state & np.uint16(Pte.PRESENT | Pte.ZERO)) == np.uint16(Pte.PRESENT)
    large: NDArray[np.bool_] = mapped & (columns.folio_order > 0)
    return large
