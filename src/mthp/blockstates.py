"""The state of blocks before and after an attempt, and the outcome that these states show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mthp.geometry import Geometry
from mthp.ptes import ORDER_UNKNOWN, Block, Pte, PteColumns, page_numbers, spread
from mthp.results import BlockOutcome, ScanResult

SMALLER_FOLIOS = "the kernel made smaller folios of it"
SPLIT_AGAIN = "it was split or unmapped again at once"
EXITED = "the target exited before its page tables could be read again"


@dataclass(frozen=True, slots=True)
class BlockStates:
    """The contents of some blocks at one moment: columns of shape (blocks,).

    Attributes:
        large: bool: the whole block lies in one folio of its order or a larger one, as far as frames are readable; at
            the PMD order, one PMD entry maps it.
        partly: bool: a page of the block lies in a folio of its order or a larger one.
        seen: bool: whether folio sizes are readable.
        full: bool: all its pages are present, and none is the zero page.
        contents: int64: pages that are present and not zero, or swapped out.
        swapped: int64: pages that are swapped out.
    """

    large: NDArray[np.bool_]
    partly: NDArray[np.bool_]
    seen: NDArray[np.bool_]
    full: NDArray[np.bool_]
    contents: NDArray[np.int64]
    swapped: NDArray[np.int64]


def states_of(columns: PteColumns, blocks: Sequence[Block], geometry: Geometry) -> BlockStates:
    """Return the states of `blocks`, each of which lies in one segment of `columns`."""
    page_size = geometry.page_size
    segments = [(address, address + (page_size << order)) for address, order in blocks]
    firsts, lasts = page_numbers(segments, page_size).T
    counts, orders = lasts - firsts, np.array([order for _, order in blocks], np.int64)
    begins = np.cumsum(counts) - counts
    pages = spread(columns.first_pages(firsts, lasts, page_size), counts)
    state, order = columns.state[pages], columns.folio_order[pages]
    real = (state & np.uint16(Pte.PRESENT | Pte.ZERO)) == np.uint16(Pte.PRESENT)
    by_pmd = orders == geometry.pmd_order
    in_large = real & (order >= np.repeat(orders, counts))
    large = np.logical_and.reduceat(in_large, begins)
    if columns.pfn is not None:
        # Pages of one folio are contiguous in memory, and folios are naturally aligned.
        frames = columns.pfn[pages].view(np.int64)
        expected = np.repeat(frames[begins] - begins, counts) + np.arange(len(pages))
        large &= np.logical_and.reduceat(frames == expected, begins) & (frames[begins] % counts == 0)
    mapped = np.logical_and.reduceat(real & ((state & np.uint16(Pte.PMD_MAPPED)) != 0), begins)
    swapped = np.add.reduceat((state & np.uint16(Pte.SWAP)) != 0, begins, dtype=np.int64)
    held = np.add.reduceat(real, begins, dtype=np.int64)
    return BlockStates(
        large=np.where(by_pmd, mapped, large),
        partly=np.logical_or.reduceat(in_large, begins),
        seen=by_pmd | ~np.logical_or.reduceat(order == ORDER_UNKNOWN, begins),
        full=held == counts,
        contents=held + swapped,
        swapped=swapped,
    )


def already(block: Block, geometry: Geometry) -> BlockOutcome:
    """Return the outcome of a block that is already large, so that it needs no attempt."""
    by_pmd = block[1] == geometry.pmd_order
    result = ScanResult.PMD_MAPPED if by_pmd else ScanResult.PTE_MAPPED_HUGEPAGE
    return BlockOutcome(*block, result, result.meaning)


def shown(
    claims: Sequence[BlockOutcome], before: BlockStates, after: BlockStates, geometry: Geometry
) -> list[BlockOutcome]:
    """Return the outcomes of attempts as the page tables show them.

    MADV_COLLAPSE also succeeds for a range that was split again at once, a fault falls back to smaller folios, and a
    block that one mechanism did not make may have been made by another.

    Args:
        claims: the mechanism's result of each block.
        before, after: the states of these blocks.
    """
    outcomes = []
    # A page that the target freed and wrote again is not in the folio any more, but the others are.
    small = after.full & ~after.partly
    columns = (before.contents, before.large, after.large, after.seen, small)
    rows = zip(claims, *(column.tolist() for column in columns), strict=True)
    for claim, contents, was_large, is_large, is_seen, is_small in rows:
        succeeded = claim.result is ScanResult.SUCCEED
        if claim.verified is not False and ((is_large and not was_large) or (succeeded and not is_seen)):
            filled = (1 << claim.order) - contents
            # The refusal of the whole space does not hold for this block: another mthp may have made it.
            outcome = replace(
                claim,
                result=ScanResult.SUCCEED,
                reason=claim.reason if claim.left_filled else "",
                copied=contents,
                filled=filled,
                everywhere=False,
                passing=False,
            )
        elif not succeeded:
            outcome = replace(claim, copied=0, filled=0)
        elif is_small and claim.order < geometry.pmd_order:
            outcome = replace(claim, result=ScanResult.ALLOC_HUGE_PAGE_FAIL, reason=SMALLER_FOLIOS, copied=0, filled=0)
        else:
            outcome = replace(claim, result=ScanResult.PTE_NON_PRESENT, reason=SPLIT_AGAIN, copied=0, filled=0)
        outcomes.append(outcome)
    return outcomes
