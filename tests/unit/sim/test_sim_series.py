"""Rules of the series' kernels in the simulated machine, with their bugs, one rule a test.

The recorded cases hold the whole against real kernels (tests/golden); these say which rule it is.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mthp.geometry import Geometry
from mthp.results import ScanResult
from mthp.sim import Machine
from mthp.sim.address_space.access import Fault
from mthp.sim.kernel import Kernel, kernel_of
from mthp.sim.mm import HUGEPAGE
from mthp.sim.trace import Collapse, Isolate, ScanPmd
from mthp.tunables import Switches, Tunables
from simcheck import check

SMALL = Geometry("64-ptes", 4096, 6)
START, PAGE = SMALL.pmd_size, SMALL.page_size
R = ScanResult


class Series:
    """A machine with the policy of a series, and a mapping of two PMD ranges."""

    def __init__(
        self, policy: str, orders: set[int], none: int = 63, swap: int = 8, kernel: Kernel | None = None
    ) -> None:
        self.machine = Machine(
            SMALL,
            node_frames=[4096],
            swap_slots=64,
            switches=Switches("never", dict.fromkeys(orders, "madvise")),
            tunables=Tunables(none, swap, 32, 4096),
            policy=policy,
            kernel=Kernel() if kernel is None else kernel,
        )
        self.mm = self.machine.create_mm()
        self.machine.map(self.mm, START, START + 2 * SMALL.pmd_size, flags={HUGEPAGE})
        self.machine.khugepaged.visit(self.mm)
        self.machine.trace.enabled = True

    def write(self, *pages: range, by: int = 0) -> None:
        """Write to pages; with faults of an order if `by` says so."""
        before = self.machine.parts.switches
        self.machine.parts.switches = Switches("never", {by: "madvise"} if by else {})
        for run in pages:
            for page in run:
                assert self.machine.write(self.mm, START + page * PAGE, page + 1) is Fault.DONE
        self.machine.parts.switches = before

    def collapses(self) -> list[tuple[int, str]]:
        """Run a full scan, and return order and result of each attempt."""
        self.machine.khugepaged.full_scan()
        return self.taken()

    def taken(self) -> list[tuple[int, str]]:
        self.events = self.machine.trace.take()
        return [(event.order, event.result.name) for event in self.events if isinstance(event, Collapse)]

    def scans(self) -> list[ScanResult]:
        return [event.result for event in self.events if isinstance(event, ScanPmd)]

    def orders(self) -> list[int]:
        """Return the order of the folio of each page of the first PMD range, -1 where none is mapped."""
        ptes = self.mm.ptes(START, SMALL.ptes_per_pmd)
        found = self.machine.parts.memory.order[np.where(ptes.pages(), ptes.value, 0)]
        return [int(order) if page else -1 for order, page in zip(found, ptes.pages(), strict=True)]

    def collapsed(self) -> int:
        return self.machine.counters["pages_collapsed"]


def test_per_order_goes_on_behind_a_large_folio_from_the_page_that_was_hit() -> None:
    """Pages 3 to 15 of a folio are left, so the run at 0 hits page 3: 3 + 16 is where the next run begins."""
    series = Series("per-order", {4}, none=4)
    series.write(range(16), by=4)
    assert series.machine.madvise(series.mm, START, START + 3 * PAGE, "DONTNEED") == 0
    series.write(range(3), range(16, 64))
    assert series.collapses() == [(4, "SUCCEED")] * 2
    assert series.orders() == [0] * 3 + [4] * 13 + [0] * 3 + [4] * 32 + [0] * 13
    assert check(series.machine) == []


def test_per_order_reads_no_entries_behind_the_page_table() -> None:
    series = Series("per-order", {4}, none=4)
    series.write(range(16), by=4)
    assert series.machine.madvise(series.mm, START, START + 3 * PAGE, "DONTNEED") == 0
    series.write(range(3), range(16, 64))
    series.collapses()
    # The run at 51 would reach from the last 13 entries over the end.
    assert series.scans()[0] is R.PAGE_NULL
    assert series.machine.parts.beyond_table == START + 51 * PAGE


def test_per_order_goes_on_in_the_next_range_behind_a_folio_at_the_end() -> None:
    series = Series("per-order", {4}, none=0)
    series.write(range(48))
    series.write(range(48, 64), by=4)
    assert series.collapses() == [(4, "SUCCEED")] * 3
    assert series.scans()[0] is R.NO_PTE_TABLE
    assert series.collapsed() == 0


def test_per_order_never_tries_an_order_again_that_failed() -> None:
    series = Series("per-order", {2, 3, 4}, none=63, swap=32)
    series.write(range(64))
    # Of order 4 the run at 0 has too many swap entries, of order 3 none has; at 16 order 4 would do.
    assert series.machine.madvise(series.mm, START, START + 4 * PAGE, "PAGEOUT") == 0
    assert series.machine.madvise(series.mm, START + 8 * PAGE, START + 13 * PAGE, "PAGEOUT") == 0
    assert {order for order, _ in series.collapses()} <= {2, 3}


def test_per_order_never_forgets_that_it_met_a_page_that_may_be_written() -> None:
    """So the scan of a later run passes without one, and it is isolation that finds none."""
    series = Series("per-order", {4}, none=0, kernel=Kernel(wants_writable=True))
    series.write(range(32))
    series.machine.exit(series.machine.fork(series.mm))
    series.write(range(16))
    assert series.collapses() == [(4, "SUCCEED"), (4, "PAGE_RO")]
    # That page is one that the scan stops at, too: here the first of the folio that was made.
    assert series.collapses() == [(4, "PAGE_RO")]


def test_per_order_says_of_a_range_what_became_of_the_last_run() -> None:
    series = Series("per-order", {4}, none=0)
    series.write(range(32))
    assert series.collapses() == [(4, "SUCCEED")] * 2
    assert series.scans()[0] is R.EXCEED_NONE_PTE
    assert series.collapsed() == 0


def test_per_order_forced_tries_the_enabled_orders_without_limits() -> None:
    series = Series("per-order", {3}, none=0)
    series.write(range(1), range(8, 9), range(20, 64))
    series.machine.pin(series.mm, START + 63 * PAGE)
    series.machine.madvise_collapse(series.mm, START, START + SMALL.pmd_size)
    assert series.taken() == [(3, "SUCCEED")] * 7
    assert series.orders()[:56] == [3] * 56


def test_the_seed_allocates_for_orders_that_are_off_and_fails() -> None:
    series = Series("rfc", {6}, none=32)
    series.write(range(16))
    assert "VMA_CHECK" in {result for _, result in series.collapses()}
    assert series.scans()[0] is R.FAIL
    again = Series("rfc2", {6}, none=32)
    again.write(range(16))
    assert again.collapses() == []


def test_the_seed_goes_into_the_halves_after_any_failure() -> None:
    series = Series("rfc", {3, 4, 5, 6}, none=31)
    series.write(range(16), by=4)
    assert series.machine.madvise(series.mm, START + 8 * PAGE, START + 16 * PAGE, "DONTNEED") == 0
    series.write(range(8, 16))
    assert [result for order, result in series.collapses() if order == 4][:1] == ["PTE_MAPPED_HUGEPAGE"]
    assert series.orders()[:16] == [4] * 8 + [3] * 8


def test_the_seed_looks_for_a_large_folio_before_it_counts_shared_pages() -> None:
    series = Series("rfc2", {3, 4, 5, 6}, none=31)
    series.write(range(16), by=4)
    series.machine.fork(series.mm)
    isolated = [result for order, result in series.collapses() if order == 4]
    assert isolated[:1] == ["PTE_MAPPED_HUGEPAGE"]


def test_the_seeds_second_version_wants_neither_swap_nor_shared_pages_below_the_pmd_order() -> None:
    for policy, results in (("rfc", "SUCCEED"), ("rfc2", "EXCEED_SWAP_PTE")):
        series = Series(policy, {3, 6}, none=15)
        series.write(range(44))
        assert series.machine.madvise(series.mm, START, START + PAGE, "PAGEOUT") == 0
        assert next(result for order, result in series.collapses() if order == 3) == results


@pytest.mark.parametrize(("policy", "counted"), [("rfc", 2), ("rfc2", 2), ("mainline", 1)])
def test_the_seed_counts_ranges_that_are_mapped_already(policy: str, counted: int) -> None:
    series = Series(policy, {6})
    series.write(range(64))
    assert series.collapses() == [(6, "SUCCEED")]
    assert series.collapses() == []
    assert series.collapsed() == counted
    series.machine.madvise_collapse(series.mm, START, START + SMALL.pmd_size)
    assert series.collapsed() == counted + (policy != "mainline")


def test_an_always_order_of_the_second_version_needs_no_bits() -> None:
    series = Series("rfc2", {6}, none=31)
    series.write(range(33))
    assert series.collapses() == []
    series.machine.parts.switches = Switches("never", {6: "always"})
    assert series.collapses() == [(6, "SUCCEED")]


@pytest.mark.parametrize("policy", ["rfc", "rfc2", "per-order"])
def test_madvise_leaves_runs_without_contents_alone(policy: str) -> None:
    series = Series(policy, {3, 4, 5, 6}, none=63)
    series.write(range(8))
    series.machine.pin(series.mm, START)
    series.machine.madvise_collapse(series.mm, START, START + SMALL.pmd_size)
    assert set(series.orders()[8:]) <= {-1}


def test_old_kernels_guess_from_the_first_page_whether_a_folio_is_shared() -> None:
    for first_page, kernel in ((True, kernel_of((6, 12), "pache-rfc2")), (False, Kernel())):
        series = Series("rfc2", {6}, none=63, kernel=replace(kernel, wants_writable=False))
        series.write(range(16), by=4)
        series.write(range(16, 64))
        child = series.machine.fork(series.mm)
        # The child keeps the last page of the folio alone, and the parent lost one: no more mappings than pages.
        assert series.machine.madvise(series.mm, START + 7 * PAGE, START + 8 * PAGE, "DONTNEED") == 0
        assert series.machine.madvise(child, START, START + 15 * PAGE, "DONTNEED") == 0
        assert series.machine.madvise(child, START + 16 * PAGE, START + 64 * PAGE, "DONTNEED") == 0
        series.machine.parts.tunables = replace(series.machine.parts.tunables, max_ptes_shared=4)
        series.machine.khugepaged.full_scan()
        events = series.machine.trace.take()
        scanned = next(event.result for event in events if isinstance(event, ScanPmd))
        assert scanned is (R.SUCCEED if first_page else R.EXCEED_SHARED_PTE)
        assert any(isinstance(event, Isolate) for event in events) is first_page
