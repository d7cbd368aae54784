"""Plans of memory in no whole PMD range: inside one mapping, by the policy's arithmetic, carried out as planned."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeSpace
from mthp.engine.collapse import collapse_space
from mthp.engine.planning import plan_space
from mthp.engine.policy_lookup import policy_names
from mthp.engine.select import PlanOptions
from mthp.engine.space_plan import SpacePlan
from mthp.geometry import GEOMETRIES, Geometry
from mthp.means import Means
from mthp.ptes import ORDER_NONE, Pte
from mthp.sim import Machine
from mthp.vma import Vma
from simcheck import check
from strategies import examples

PAGE = 4096
GEOMETRY = Geometry("32-ptes", PAGE, 5)
SIZE = GEOMETRY.pmd_size
N = GEOMETRY.ptes_per_pmd
MOVABLE = frozenset({"rd", "wr", "mr", "mw", "me", "ac"})

Folio = tuple[int, int]


@st.composite
def spaces(draw: st.DrawFn) -> FakeSpace:
    """Mappings that begin and end at any page, of which several may lie in one PMD range."""
    at, mappings = SIZE, []
    for _ in range(draw(st.integers(1, 6))):
        at += draw(st.sampled_from((0, 0, 1, 3, 16, 40))) * PAGE
        pages = draw(st.sampled_from((3, 4, 5, 8, 12, 19, 31, 32, 64, 77)))
        runs = draw(st.lists(st.tuples(st.booleans(), st.sampled_from((1, 3, 4, 8, 16))), min_size=1, max_size=6))
        present = np.resize(np.concatenate([np.full(count, there) for there, count in runs]), pages)
        flags = MOVABLE | draw(st.sampled_from((frozenset(), frozenset(), frozenset({"lo"}))))
        vma = Vma(at, at + pages * PAGE, "rw-p", flags=flags, has_anon_vma=True)
        state = present * np.uint16(Pte.PRESENT)
        mappings.append((vma, state, np.where(present, np.int8(0), np.int8(ORDER_NONE))))
        at = vma.end
    return FakeSpace(mappings, geometry=GEOMETRY, orders=range(2, 6))


def options(draw: st.DataObject, policy: str, *, small: bool) -> PlanOptions:
    orders = draw.draw(st.sets(st.integers(2, 5), min_size=1), "orders")
    none = draw.draw(st.sampled_from((0, 7, 16, 31)), "max_ptes_none")
    return PlanOptions(policy=policy, orders=orders, max_ptes_none=none, small=small)


def folios(plan: SpacePlan) -> list[Folio]:
    return list(zip(plan.folios.address.tolist(), plan.folios.order.tolist(), strict=True))


def in_a_whole_range(space: FakeSpace, address: int) -> bool:
    start = address // SIZE * SIZE
    return any(vma.start <= start and start + SIZE <= vma.end for vma in space.vmas())


@pytest.mark.parametrize("policy", policy_names())
@given(space=spaces(), data=st.data())
@settings(max_examples=examples(40))
def test_blocks_lie_in_one_mapping_and_whole_ranges_are_planned_as_ever(
    policy: str, space: FakeSpace, data: st.DataObject
) -> None:
    choice = options(data, policy, small=True)
    with_small = folios(plan_space(space, choice))
    without = folios(plan_space(space, PlanOptions(policy, choice.orders, max_ptes_none=choice.max_ptes_none)))
    assert [folio for folio in with_small if in_a_whole_range(space, folio[0])] == without
    end = 0
    for address, order in with_small:
        assert address % (PAGE << order) == 0
        assert address >= end
        end = address + (PAGE << order)
        mapping = next(vma for vma in space.vmas() if vma.start <= address < vma.end)
        assert end <= mapping.end
        assert "lo" not in mapping.flags or in_a_whole_range(space, address)


class Plainly:
    """Return what a policy makes of a mapping outside of its whole PMD ranges, block by block."""

    def __init__(self, space: FakeSpace, vma: Vma, choice: PlanOptions) -> None:
        self.first, self.end = vma.start // PAGE, vma.end // PAGE
        self.present = space.read([(vma.start, vma.end)]).state != 0
        self.policy, self.none = choice.policy, choice.max_ptes_none or 0
        assert isinstance(choice.orders, set)
        self.enabled: list[int] = sorted(choice.orders, reverse=True)
        self.refused = "lo" in vma.flags

    def folios(self) -> Iterator[Folio]:
        for start in range(self.first // N * N, self.end, N):
            if not self.is_inside(start, 5) and not self.refused:
                yield from (self.run_by_run if self.policy == "per-order" else self.tree)(start, 5)

    def is_inside(self, at: int, order: int) -> bool:
        return self.first <= at and at + (1 << order) <= self.end

    def is_full(self, at: int, order: int) -> bool:
        there = int(self.present[at - self.first : at - self.first + (1 << order)].sum())
        limit = self.none >> (5 - order)
        if self.policy == "mainline":
            limit = (1 << order) - 1 if self.none == N - 1 else 0
        return there > 0 and (1 << order) - there <= limit

    def tree(self, at: int, order: int) -> Iterator[Folio]:
        if at >= self.end or at + (1 << order) <= self.first or order < self.enabled[-1]:
            return
        if self.is_inside(at, order) and order in self.enabled and self.is_full(at, order):
            yield at * PAGE, order
            return
        for half in (at, at + (1 << order - 1)):
            yield from self.tree(half, order - 1)

    def run_by_run(self, at: int, order: int) -> Iterator[Folio]:
        if at >= self.end or at + (1 << order) <= self.first or order < 2:
            return
        if not self.is_inside(at, order):
            for half in (at, at + (1 << order - 1)):
                yield from self.run_by_run(half, order - 1)
            return
        stop = at + (1 << order)
        for tried in (each for each in self.enabled if each <= order):
            while at < stop and self.is_full(at, tried):
                yield at * PAGE, tried
                at += 1 << tried


@pytest.mark.parametrize("policy", ["mainline", "no-creep", "per-order"])
@given(space=spaces(), data=st.data())
@settings(max_examples=examples(80))
def test_small_blocks_are_those_of_the_policy(policy: str, space: FakeSpace, data: st.DataObject) -> None:
    choice = options(data, policy, small=True)
    found = [folio for folio in folios(plan_space(space, choice)) if not in_a_whole_range(space, folio[0])]
    assert found == sorted(folio for vma in space.vmas() for folio in Plainly(space, vma, choice).folios())


@pytest.mark.parametrize("policy", policy_names())
@given(space=spaces(), data=st.data())
@settings(max_examples=examples(30))
def test_a_collapse_makes_what_was_planned_and_accounts_for_it(
    policy: str, space: FakeSpace, data: st.DataObject
) -> None:
    choice = options(data, policy, small=True)
    plan = plan_space(space, choice)
    report = collapse_space(space, choice, Means("madvise,move", fill=True, max_bloat=None))
    assert sorted(space.attempts) == folios(plan)
    assert sum(tally.made for tally in (report.ranges, *report.folios.values())) == len(plan.folios)
    assert report.after.pages == plan.after.pages
    assert report.filled_bytes == plan.filled_bytes
    outside = sum(
        int((space.read([(at, at + PAGE)]).state != 0).sum())
        for vma in space.vmas()
        for at in range(vma.start, vma.end, PAGE)
        if not (vma.start <= at // SIZE * SIZE and at // SIZE * SIZE + SIZE <= vma.end)
    )
    assert report.after.out_of_reach == outside


@pytest.mark.parametrize("name", ["x86-64", "arm64-16k", "ppc64-64k"])
@given(data=st.data())
@settings(max_examples=examples(30))
def test_the_simulated_machine_moves_what_was_planned_and_keeps_every_byte(name: str, data: st.DataObject) -> None:
    geometry = GEOMETRIES[name]
    page, n = geometry.page_size, geometry.ptes_per_pmd
    machine = Machine(geometry)
    mm, at = machine.create_mm(), geometry.pmd_size + data.draw(st.integers(0, n)) * page
    held: dict[int, int] = {}
    for index in range(data.draw(st.integers(1, 5))):
        pages = data.draw(st.sampled_from((3, 4, 5, 7, 16, n // 2 + 3, n + 9)))
        # Neighbours that are alike would become one mapping.
        machine.map(mm, at, at + pages * page, flags={"hg"} if index % 2 else ())
        chosen = data.draw(st.sets(st.integers(0, pages - 1), min_size=1)) | set(
            range(data.draw(st.integers(0, pages)))
        )
        written = at + np.array(sorted(chosen)) * page
        machine.touch(mm, written, contents=written // page)
        held |= {int(address): int(address) // page for address in written}
        at += (pages + data.draw(st.sampled_from((0, 0, 2)))) * page
    choice = PlanOptions(
        max_ptes_none=data.draw(st.sampled_from((0, n - 1))), orders=geometry.anon_orders[:-1], small=True
    )
    space, rss = machine.space(mm), mm.anon_pages

    report = collapse_space(space, choice, Means("move", fill=True, max_bloat=None))

    plan = report.plan
    assert {order: tally.made for order, tally in report.folios.items()} == plan.folios_by_order
    for address, order in folios(plan):
        assert set(space.read([(address, address + geometry.size_of(order))]).folio_order.tolist()) == {order}
    assert (mm.anon_pages - rss) * page == plan.filled_bytes
    assert {address: machine.read(mm, address)[1] for address in held} == held
    assert check(machine) == []
