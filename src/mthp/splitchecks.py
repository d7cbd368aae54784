"""Checks before a PMD range is collapsed and split, because MADV_COLLAPSE follows no policy.

In the whole range it fills holes, reads back swapped-out pages, copies shared pages, and keeps pages freed lazily. The
plan decided on the contents of the planned blocks. The rest of the range must not change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.eligibility import eligibility
from mthp.geometry import Geometry
from mthp.ptes import ORDER_UNKNOWN, Block, Pte, PteColumns
from mthp.results import ScanResult
from mthp.tunables import Switches
from mthp.vma import Vma, VmaKind

Refusal = tuple[ScanResult, str]
"""The reason why a range is left alone: the result of its blocks, and the reason in words."""


@dataclass(frozen=True, slots=True)
class RangeLayout:
    """The planned layout of a PMD range.

    Attributes:
        start: start address.
        orders: int8, shape (pages,): the planned order of each page's folio, 0 for base pages and holes.
        planned: bool, shape (pages,): which pages lie in planned blocks.
        holes: bool, shape (pages,): which pages are none or the zero page.
        swapped: number of its pages that are swapped out.
    """

    start: int
    orders: NDArray[np.int8]
    planned: NDArray[np.bool_]
    holes: NDArray[np.bool_]
    swapped: int

    @property
    def fill(self) -> int:
        """Number of pages that planned blocks add."""
        return int((self.holes & self.planned).sum())

    @property
    def spare(self) -> NDArray[np.bool_]:
        """The pages that a collapse fills outside of planned blocks: bool, shape (pages,)."""
        return self.holes & ~self.planned


def layout_of(start: int, blocks: list[Block], columns: PteColumns, geometry: Geometry) -> RangeLayout:
    """Return the planned layout of the PMD range at `start`: the blocks in it, and its present large folios.

    Args:
        columns: the entries of the range, as just read.
    """
    present = columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO)
    orders = _whole_folios(columns, present)
    planned = np.zeros(geometry.ptes_per_pmd, np.bool_)
    for address, order in blocks:
        first = (address - start) // geometry.page_size
        orders[first : first + (1 << order)] = order
        planned[first : first + (1 << order)] = True
    swap = columns.has(Pte.SWAP)
    return RangeLayout(start, orders, planned, ~present & ~swap, int(swap.sum()))


def _whole_folios(columns: PteColumns, present: NDArray[np.bool_]) -> NDArray[np.int8]:
    """Return the order of each page's folio if the folio is complete and aligned, else 0."""
    orders = np.where(present, np.maximum(columns.folio_order, 0), 0).astype(np.int8)
    if columns.pfn is None or not orders.any():
        return np.zeros_like(orders)
    frames, pages = columns.pfn.view(np.int64), np.arange(len(orders))
    for order in np.unique(orders[orders > 0]).tolist():
        size = 1 << order
        first = pages >> order << order
        # Complete and aligned: all pages map the same folio's frames in order, from its first one on.
        fits = (orders == order) & (frames - pages == frames[first] - first) & (frames[first] % size == 0)
        orders[(orders == order) & ~fits.reshape(-1, size).all(axis=1).repeat(size)] = 0
    return orders


def refusal_of_mapping(vma: Vma | None, start: int, geometry: Geometry, *, thp_disabled: bool) -> Refusal | None:
    """Return why nothing in the PMD range at `start` may be collapsed, by its mapping; None if something may.

    Args:
        vma: the mapping at `start`; None without one.
        thp_disabled: whether the process switched THP off for itself.
    """
    if vma is None:
        return ScanResult.VMA_NULL, ""
    # MADV_COLLAPSE does not obey the switches.
    allowed = eligibility(vma, geometry, Switches(), trigger="madvise", thp_disabled=thp_disabled)
    if vma.kind is not VmaKind.ANON or not allowed:
        return ScanResult.VMA_CHECK, allowed.reason or "not anonymous memory"
    if vma.start > start or vma.end < start + geometry.pmd_size:
        return ScanResult.ADDRESS_RANGE, ""
    if vma.uffd_armed:
        return ScanResult.VMA_CHECK, "registered with userfaultfd, so its holes must not be filled"
    return None


def refusal_of_pages(
    layout: RangeLayout, columns: PteColumns, *, locked: bool, least_share: float = 0.0
) -> Refusal | None:
    """Return why a range is not collapsed, by its contents; None if it may be.

    Args:
        columns: the entries of the range, as just read.
        locked: whether its mapping is locked in memory.
        least_share: the least share of its contents in planned blocks, because a collapse copies all contents.
    """
    outside = ~layout.planned
    for result, bits, where, reason in _PAGES:
        if (columns.has(bits) & (outside if where == "outside" else True)).any():
            return result, reason
    if (columns.folio_order == ORDER_UNKNOWN).any():
        return ScanResult.FAIL, "the folio orders in its PMD range cannot be seen"
    if not (columns.has(Pte.PRESENT | Pte.SWAP) & ~columns.has(Pte.ZERO)).any():
        return ScanResult.NO_PTE_TABLE, ""
    # Fill of a locked mapping could not be given back: zeroes in locked memory stay (try_to_map_unused_to_zeropage(),
    # mm/migrate.c).
    if locked and layout.spare.any():
        return ScanResult.VMA_CHECK, "mlocked: the kernel keeps the zeroes that the collapse fills its holes with"
    contents = ~layout.holes
    if (contents & layout.planned).sum() < least_share * contents.sum():
        return ScanResult.FAIL, LITTLE_PLANNED.format(share=least_share)
    return None


LITTLE_PLANNED = "less than {share:.0%} of its PMD range is planned, and splitting copies all of it: --min-split-share"

_PAGES: tuple[tuple[ScanResult, Pte, str, str], ...] = (
    (ScanResult.PAGE_ANON, Pte.FILE | Pte.HUGETLB, "anywhere", ""),
    (ScanResult.PTE_UFFD, Pte.UFFD_WP, "anywhere", ""),
    (ScanResult.FAIL, Pte.GUARD, "anywhere", "there are guard pages in its PMD range"),
    (ScanResult.EXCEED_SWAP_PTE, Pte.SWAP, "outside", "pages beside it in its PMD range are swapped out"),
    (
        ScanResult.EXCEED_SHARED_PTE,
        Pte.SHARED,
        "outside",
        "pages beside it in its PMD range are shared with another process",
    ),
    (
        ScanResult.PAGE_LAZYFREE,
        Pte.LAZYFREE,
        "outside",
        "pages beside it in its PMD range were freed lazily (MADV_FREE), and would be kept",
    ),
)
"""Result, the bits that cause it, where ("anywhere" includes planned blocks), and the reason if it is not clear."""
