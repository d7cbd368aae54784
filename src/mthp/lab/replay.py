"""The replay of a trace of accesses on the memory that each setting makes, for the model of the TLB.

The memory is that of the trace's last step, taken through all scans before the replay, because the comparison is of the
folios, not of the time at which they are made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.abilities import Accesses
from mthp.addrspace import AddressSpace
from mthp.engine.planes import Planes
from mthp.engine.select import PlanOptions, base_rules, jobs_of, ranges_of, read_planes
from mthp.lab.evaluate import PORTION_RANGES
from mthp.lab.makers import Maker
from mthp.lab.scans import MAX_SCANS, settled
from mthp.lab.tlb import Processor, Tlb, TlbCounts
from mthp.ptes import in_portions


@dataclass(frozen=True, slots=True)
class MappedFolios:
    """The mapping of pages in large folios, by ascending page number. All others are base pages.

    Attributes:
        page: int64, shape (pages,): page numbers.
        order: int8, the same shape: order of the folio.
        huge: bool, the same shape: a PMD entry maps it.
    """

    page: NDArray[np.int64]
    order: NDArray[np.int8]
    huge: NDArray[np.bool_]

    def of(self, pages: NDArray[np.int64]) -> tuple[NDArray[np.int8], NDArray[np.bool_]]:
        """Return the order and the huge bit of some page numbers, in any order: int8 and bool, their shape."""
        if not len(self.page):
            return np.zeros(len(pages), np.int8), np.zeros(len(pages), np.bool_)
        # A page behind the last one is compared with the last, and differs.
        at = np.minimum(np.searchsorted(self.page, pages), len(self.page) - 1)
        there = self.page[at] == pages
        return np.where(there, self.order[at], np.int8(0)), there & self.huge[at]


def mapped_after(space: AddressSpace, options: PlanOptions, scans: int | None) -> MappedFolios:
    """Return how the large folios of `space` are mapped after some scans under one setting.

    Args:
        scans: number of scans; 0 for the present state, None for as many as it takes until nothing changes.

    Raises:
        UsageError: as :func:`mthp.plan_ranges`.
        TargetVanishedError: the process exited in the meantime.
    """
    maker, base = Maker.named(options.policy), base_rules(space, options)
    jobs, _ = jobs_of(space, options, base)
    parts: list[MappedFolios] = []
    granule = space.geometry.pmd_size
    for job in jobs:
        for portion in in_portions(space.populated(job.segments, granule), PORTION_RANGES * granule):
            address = ranges_of(portion, space.geometry)
            _, planes = read_planes(space, job, address)
            planes = settled(planes, maker, job.rules, MAX_SCANS if scans is None else scans)
            parts.append(_large(address // np.uint64(space.geometry.page_size), planes))
    page = np.concatenate([part.page for part in parts] or [np.empty(0, np.int64)])
    order = np.concatenate([part.order for part in parts] or [np.empty(0, np.int8)])
    huge = np.concatenate([part.huge for part in parts] or [np.empty(0, np.bool_)])
    # Mappings of different jobs alternate in the address space.
    by_page = np.argsort(page)
    return MappedFolios(page[by_page], order[by_page], huge[by_page])


def _large(first: NDArray[np.uint64], planes: Planes) -> MappedFolios:
    """Return the pages of large folios in the PMD ranges that begin at the page numbers `first`."""
    if planes.folio_order is None:
        return MappedFolios(np.empty(0, np.int64), np.empty(0, np.int8), np.empty(0, np.bool_))
    rows, offsets = np.nonzero((planes.folio_order > 0) & planes.occupied)
    huge = np.zeros(len(first), np.bool_) if planes.pmd_mapped is None else planes.pmd_mapped
    return MappedFolios(first.astype(np.int64)[rows] + offsets, planes.folio_order[rows, offsets], huge[rows])


def misses(
    space: AddressSpace, settings: Sequence[PlanOptions], accesses: Accesses, processor: Processor, scans: int | None
) -> tuple[TlbCounts, list[TlbCounts]]:
    """Return the TLB counts of a trace with the present memory, and with the memory that each of `settings` makes.

    Raises:
        MthpError: as :func:`mapped_after`.
    """
    # Without a scan only the choice of mappings matters, which is that of the first setting.
    before = mapped_after(space, settings[0], 0)
    return (
        replayed(accesses, before, processor, space.geometry.page_size),
        [
            replayed(accesses, mapped_after(space, options, scans), processor, space.geometry.page_size)
            for options in settings
        ],
    )


def walks_at(scan: int, last: int, before: TlbCounts, after: TlbCounts) -> int | None:
    """Return the page walks in the state after `scan`; None between the first and the last, which are not replayed."""
    return before.walks if scan == 0 else after.walks if scan == last else None


def replayed(accesses: Accesses, mapped: MappedFolios, processor: Processor, page_size: int) -> TlbCounts:
    """Return the counts of a trace on a TLB that is empty at first."""
    tlb = Tlb(processor, page_size)
    for pages in accesses():
        tlb.access(pages, *mapped.of(pages))
    return tlb.counts
