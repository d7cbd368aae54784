"""Any memory and any layout: ``split`` leaves the page tables as planned, and Rss is predicted, after a trim too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mthp.engine.collapse import collapse_space
from mthp.engine.select import PlanOptions
from mthp.engine.trim import TrimOptions, trim_space
from mthp.geometry import GEOMETRIES
from mthp.means import Means
from mthp.ptes import Block, Pte
from mthp.results import ScanResult
from mthp.sim import Machine
from mthp.sim.kernel import kernel_of
from mthp.trimming import TrimBy
from simcheck import check


@st.composite
def layouts(draw: st.DrawFn, pmd_order: int) -> list[tuple[int, int]]:
    """Disjoint aligned blocks below the PMD order: first page and order of each."""
    blocks, todo = [], [(0, pmd_order)]
    while todo:
        first, order = todo.pop()
        kind = draw(st.sampled_from(("block", "halves", "halves", "nothing")))
        if order < pmd_order and kind == "block":
            blocks.append((first, order))
        elif kind == "halves" and order > 2:
            todo += [(first, order - 1), (first + (1 << order - 1), order - 1)]
    return sorted(blocks)


@pytest.mark.parametrize("release", [(6, 12), (6, 18), (7, 3)])
@pytest.mark.parametrize("name", ["x86-64", "ppc64-64k"])
@given(data=st.data())
def test_the_tables_are_the_plan_and_rss_is_the_prediction(
    name: str, release: tuple[int, int], data: st.DataObject
) -> None:
    geometry = GEOMETRIES[name]
    n, page = geometry.ptes_per_pmd, geometry.page_size
    machine = Machine(geometry, kernel=kernel_of(release))
    mm, start = machine.create_mm(), geometry.pmd_size
    machine.map(mm, start, 2 * start)
    # 0 a hole, 1 the zero page, 2 a page of zeroes, 3 contents.
    mixtures = ((0.3, 0.1, 0.2, 0.4), (0.9, 0.0, 0.0, 0.1), (0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.0, 1.0))
    chance = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    kinds = chance.choice(4, n, p=np.array(data.draw(st.sampled_from(mixtures))))
    pages = start + np.arange(n) * page
    machine.touch(mm, pages[kinds == 1], write=False)
    machine.touch(mm, pages[kinds >= 2], contents=np.where(kinds >= 2, kinds - 2, 0)[kinds >= 2])
    blocks: list[Block] = [(start + first * page, order) for first, order in data.draw(layouts(geometry.pmd_order))]
    held = [machine.read(mm, int(address))[1] for address in pages]
    space, rss = machine.space(mm), mm.anon_pages

    outcomes = space.collapse_blocks(blocks, Means(mechanism="split"))

    columns = space.read([(start, 2 * start)])
    if not any(kinds >= 2):
        assert ScanResult.SUCCEED not in {outcome.result for outcome in outcomes}
        return
    assert {outcome.result for outcome in outcomes} <= {ScanResult.SUCCEED}
    planned = np.zeros(n, np.int64)
    for address, order in blocks:
        first = (address - start) // page
        planned[first : first + (1 << order)] = order
    present = columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO)
    assert columns.folio_order[present].tolist() == planned[present].tolist()
    kept = (planned > 0) | (kinds == 3) if blocks else kinds >= 2
    assert present.tolist() == kept.tolist()
    assert mm.anon_pages - rss == int(kept.sum()) - int((kinds >= 2).sum())
    assert [machine.read(mm, int(address))[1] for address in pages] == held
    assert check(machine) == []


@given(holes=st.sets(st.integers(0, 511)), max_ptes_none=st.sampled_from((0, 511)))
def test_the_engine_makes_what_it_planned_and_adds_what_it_said(holes: set[int], max_ptes_none: int) -> None:
    machine = Machine()
    mm, start, page = machine.create_mm(), machine.geometry.pmd_size, machine.geometry.page_size
    machine.map(mm, start, 2 * start)
    machine.touch(mm, start + np.array(sorted({*range(512)} - holes), np.int64) * page)
    space, rss = machine.space(mm), mm.anon_pages
    choice = PlanOptions(orders=(4, 6, 8), max_ptes_none=max_ptes_none)

    report = collapse_space(space, choice, Means(max_bloat=None))

    columns = space.read([(start, 2 * start)])
    planned = {
        (int(address), int(order))
        for address, order in zip(report.plan.folios.address, report.plan.folios.order, strict=True)
    }
    orders = columns.folio_order[columns.has(Pte.PRESENT)]
    assert int((orders > 0).sum()) == sum(1 << order for _, order in planned)
    for address, order in planned:
        first = (address - start) // page
        assert set(columns.folio_order[first : first + (1 << order)].tolist()) == {order}
    assert (mm.anon_pages - rss) * page == report.plan.filled_bytes


@pytest.mark.parametrize("by", ["cold", "split"])
@pytest.mark.parametrize("name", ["x86-64", "ppc64-64k"])
@given(data=st.data())
def test_a_trim_gives_back_to_the_page_what_its_plan_predicted(name: str, by: TrimBy, data: st.DataObject) -> None:
    geometry = GEOMETRIES[name]
    n, page, start = geometry.ptes_per_pmd, geometry.page_size, geometry.pmd_size
    machine = Machine(geometry)
    mm = machine.create_mm()
    machine.map(mm, start, 3 * start)
    chance = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    contents = chance.random(2 * n) < data.draw(st.sampled_from((0.02, 0.3, 0.7)))
    # Whole blocks of 64K that hold something, as programs have them.
    contents |= np.repeat(chance.random(2 * n // 16) < data.draw(st.sampled_from((0.0, 0.3))), 16)
    pages = start + np.arange(2 * n) * page
    machine.touch(mm, pages, contents=contents.astype(np.uint32))
    space = machine.space(mm)
    blocks: list[Block] = [(start + first * page, order) for first, order in data.draw(layouts(geometry.pmd_order))]
    space.collapse_blocks([*blocks, (2 * start, geometry.pmd_order)])
    held, rss = [machine.read(mm, int(address))[1] for address in pages], mm.anon_pages
    share = data.draw(st.sampled_from((0.2, 0.5, 0.9)))

    report = trim_space(space, TrimOptions(zero=share, by=by))

    assert (rss - mm.anon_pages) * page == report.plan.zero_bytes == report.given_back_bytes
    assert report.rss_before_bytes - report.rss_after_bytes == report.given_back_bytes
    assert report.complete
    assert report.trimmed == len(report.plan.folios)
    assert [machine.read(mm, int(address))[1] for address in pages] == held
    assert check(machine) == []


def test_a_folio_that_is_pinned_or_shared_is_not_trimmed() -> None:
    machine = Machine()
    mm, start, page = machine.create_mm(), machine.geometry.pmd_size, machine.geometry.page_size
    machine.map(mm, start, 3 * start)
    for first in (start, 2 * start):
        machine.touch(mm, first + np.arange(20) * page)
    space = machine.space(mm)
    space.collapse_blocks([(start, 9), (2 * start, 9)])
    machine.pin(mm, start)
    pinned = trim_space(space, TrimOptions())
    assert pinned.failed_by_result == {"PAGE_COUNT": 1}
    assert pinned.given_back_bytes == pinned.plan.gains[1] * page
    machine.touch(mm, 2 * start + np.arange(20) * page)
    space.collapse_blocks([(2 * start, 9)])
    machine.fork(mm)
    # A fork copies pinned pages, so the pinned folio stays the parent's own.
    assert trim_space(space, TrimOptions()).failed_by_result == {"PAGE_COUNT": 1, "EXCEED_SHARED_PTE": 1}
