"""Differences between kernels other than the policy: rules of releases and series.

A golden case has the release of its kernel, and the series if it was built with one. A series has its own policy, and
the rules of the release that it was built on.
"""

from __future__ import annotations

from dataclasses import dataclass

from mthp.errors import UsageError

Release = tuple[int, int]
"""Major and minor number."""

MTHP_COLLAPSE: Release = (7, 2)
"""The first release in which khugepaged collapses to orders below the PMD order, and counts per size."""

LAZYFREE_STOPS: Release = (7, 1)
"""The first release in which khugepaged leaves ranges with clean lazyfree pages alone."""

SWAPIN_THROUGH_CACHE: Release = (7, 0)
"""The first release that reads a large folio from swap even if another address space has its entries too. Before,
do_swap_page() (mm/memory.c) did so only for entries with a count of one."""

NO_PTE_TABLE: Release = (7, 0)
"""The first release known to have one scan result for a PMD entry without a page table; 6.18 has two."""

NO_WRITABLE: Release = (6, 18)
"""The first release that does not require a writable PTE (SCAN_PAGE_RO was removed)."""

UNMAPS_EVERYWHERE: Release = (7, 0)
"""The first release known to split, at once, a folio mapped by PMD entries of several address spaces. Before,
try_to_migrate_one() (mm/rmap.c) ended the walk over the mappings at the first PMD entry that it split; in 6.12 the
entries were split before the walk."""

SPLITS_PMD_IN_WALK: Release = (6, 15)
"""The first release that splits PMD entries in that walk; seen in 6.18, and not yet in 6.12."""

SPLITS_AT: Release = (6, 15)
"""The first release that accepts a fifth word in split_huge_pages, the page to split around; 6.12 reads four."""

BATCHES: Release = (6, 17)
"""The first release in which a collapse unmaps adjoining pages of an old large folio together."""

SWPIN: Release = (6, 13)
"""The first release with the counter swpin of each size."""

MM_IDS: Release = (6, 15)
"""The first release in which large folios note the address spaces that map them (folio_maybe_mapped_shared)."""

SERIES = {"jain-rfc-2024-12": "per-order", "pache-rfc1-reconstructed": "rfc", "pache-rfc2": "rfc2"}
"""The series with recordings, and the policy of each."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """The rules of a kernel; by default those of the newest release.

    Attributes:
        lazyfree_stops: khugepaged leaves ranges with clean lazyfree pages alone.
        wants_writable: a scan, or an isolation, without a writable PTE ends in PAGE_RO.
        leaves_empty_runs: the remainder of that rule, for policies that have it: MADV_COLLAPSE does not make a folio of
            a run without contents.
        shared_by_first_page: a large folio's first page decides whether it counts as shared
            (folio_likely_mapped_shared, include/linux/mm.h of Linux 6.12).
        swaps_in_shared_singly: a swap entry that several PTEs share is read as a single page.
        unmaps_one_by_one: a collapse unmaps the pages of an old large folio one by one, so that each such folio counts
            as partially mapped for a moment (split_deferred).
        unmaps_up_to_pmd: a split removes the mappings of a folio up to the first PMD entry; it fails if more map it.
        splits_at: split_huge_pages accepts the page of the folio to split around.
        counts_refused_splits: a split to order 1, or of a folio in the swap cache to large ones, counts as failed.
        counts_every_order: thp_collapse_alloc and thp_scan_exceed_* of ``/proc/vmstat`` count all orders, as in the
            series, not only the PMD order.
    """

    lazyfree_stops: bool = True
    wants_writable: bool = False
    leaves_empty_runs: bool = True
    shared_by_first_page: bool = False
    swaps_in_shared_singly: bool = False
    unmaps_one_by_one: bool = False
    unmaps_up_to_pmd: bool = False
    splits_at: bool = True
    counts_refused_splits: bool = True
    counts_every_order: bool = False


NEWEST = Kernel()


def kernel_of(release: Release, series: str | None = None) -> Kernel:
    """Return the rules of a release, or of a series that was built on it."""
    # A series keeps all other rules of the release that it was built on.
    return Kernel(
        lazyfree_stops=release >= LAZYFREE_STOPS,
        wants_writable=release < NO_WRITABLE,
        shared_by_first_page=release < MM_IDS,
        swaps_in_shared_singly=release < SWAPIN_THROUGH_CACHE,
        unmaps_one_by_one=release < BATCHES,
        unmaps_up_to_pmd=SPLITS_PMD_IN_WALK <= release < UNMAPS_EVERYWHERE,
        splits_at=release >= SPLITS_AT,
        counts_refused_splits=release >= UNMAPS_EVERYWHERE,
        counts_every_order=series is not None,
    )


def policy_of(release: Release, series: str | None = None) -> str:
    """Return the name of the policy of a release, or of a series that was built on it.

    Raises:
        UsageError: the series is not known.
    """
    if series is None:
        return "mainline" if release >= MTHP_COLLAPSE else "pmd-only"
    if series not in SERIES:
        raise UsageError(f"unknown series {series!r}", help=f"use {', '.join(SERIES)}, or name its policy")
    return SERIES[series]
