"""The price of splits: the cost of a whole PMD range if only a part is planned."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mthp import targets
from mthp.abilities import resident_bytes
from mthp.cli import plan_command
from mthp.engine.collapse import carry_out, collapse_space
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.engine.space_plan import Folios, Ranges
from mthp.engine.splitprice import SplitRanges, _writes
from mthp.means import Means
from mthp.results import ScanResult
from mthp.sim import Machine
from mthp.splitchecks import LITTLE_PLANNED
from mthp.units import format_size


def written(layout: list[int], order: int) -> int:
    """Split one part of a folio as FolioDivider does, and count the writes."""
    largest = max(layout)
    if largest == order:
        return 0
    if not largest:
        return 1
    size = 1 << largest
    return 1 + sum(written(layout[at : at + size], largest) for at in range(0, len(layout), size))


@st.composite
def layouts(draw: st.DrawFn) -> list[int]:
    """Return a layout of 64 pages in aligned folios and base pages."""
    orders: list[int] = []
    while len(orders) < 64:
        at = len(orders)
        fitting = [order for order in (0, 2, 3, 4, 5) if at % (1 << order) == 0 and at + (1 << order) <= 64]
        order = draw(st.sampled_from(fitting))
        orders += [order] * (1 << order)
    return orders


@given(st.lists(layouts(), min_size=1, max_size=4))
def test_the_writes_are_those_of_dividing_part_by_part(ranges: list[list[int]]) -> None:
    assert _writes(np.array(ranges, np.int8), 6) == sum(written(layout, 6) for layout in ranges)


def machine_with(full: int, pages: int) -> tuple[Machine, int]:
    """Return a machine with two PMD ranges of which `full` aligned runs of 16 pages, and `pages` others, are used."""
    machine = Machine()
    mm, size, page = machine.create_mm(), machine.geometry.pmd_size, machine.geometry.page_size
    machine.map(mm, size, 3 * size)
    for start in (size, 2 * size):
        machine.populate(mm, start, start + full * 16 * page)
        # Every second page of the end: no run of them is full.
        last = start + size - 2 * pages * page
        for address in range(last, start + size, 2 * page):
            machine.populate(mm, address, address + page)
    return machine, mm.id


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_the_simulated_machine_makes_the_calls_that_were_predicted(share: float) -> None:
    machine, number = machine_with(2, 100)
    space = machine.space(machine.parts.mms[number])
    plan = plan_space(space, PlanOptions(orders="64K", max_ptes_none=0))
    report = carry_out(space, plan, Means("split", min_split_share=share))
    price = report.split_price
    # 32 of 132 pages in use are planned: less than half.
    if share:
        assert (price.ranges, price.copied, price.writes) == (0, 0, 0)
        assert report.folios[4].failed == {(ScanResult.FAIL, LITTLE_PLANNED.format(share=share)): 4}
        assert report.durations.count == 0
        return
    assert report.folios[4].made == 4
    assert (price.ranges, price.copied, price.wanted) == (2, 2 * 132, 2 * 32)
    assert report.durations.count == price.ranges + price.writes
    assert f"{price.writes} splits" in price.remark(machine.geometry)


def test_a_budget_of_copying_counts_all_that_a_split_copies() -> None:
    machine, number = machine_with(2, 100)
    space, page = machine.space(machine.parts.mms[number]), machine.geometry.page_size
    plan = plan_space(space, PlanOptions(orders="64K", max_ptes_none=0))
    # Of each range 132 pages are copied for 32 in planned folios: one range fits, two do not.
    means = Means("split", max_copied=140 * page)
    allowed = carry_out(space, plan, means, dry_run=True).allowed
    assert allowed is not None
    assert allowed.folios_by_order == {4: 2}
    assert [(left.order, left.count) for left in allowed.left] == [(4, 2)]
    assert "--max-copied" in allowed.left[0].reason
    report = carry_out(space, plan, means)
    assert (report.folios[4].made, report.folios[4].over_copied) == (2, 2)
    assert report.copied_bytes == 132 * page
    assert not carry_out(space, plan, Means("split", max_copied=64 * page)).copied_bytes


def test_what_little_is_planned_of_is_left_out_of_a_dry_run_with_the_reason() -> None:
    machine, number = machine_with(2, 100)
    space = machine.space(machine.parts.mms[number])
    plan = plan_space(space, PlanOptions(orders="64K", max_ptes_none=0))
    report = carry_out(space, plan, Means("split", min_split_share=0.5), dry_run=True)
    assert report.allowed is not None
    assert not report.allowed.folios_by_order
    assert [(left.order, left.count) for left in report.allowed.left] == [(4, 4)]
    assert "--min-split-share" in report.allowed.left[0].reason


def test_holes_that_are_filled_are_not_copied() -> None:
    machine = Machine()
    mm, size, page = machine.create_mm(), machine.geometry.pmd_size, machine.geometry.page_size
    machine.map(mm, size, 2 * size)
    machine.populate(mm, size, size + 12 * page)
    choice = PlanOptions(policy="per-order", orders="64K", max_ptes_none=255)
    price = SplitRanges(plan_space(machine.space(machine.parts.mms[mm.id]), choice), [4]).price(0.0)
    assert (price.copied, price.wanted) == (12, 12)


def test_ranges_that_a_plan_does_not_know_cost_what_is_planned_in_them() -> None:
    machine, number = machine_with(2, 0)
    plan = plan_space(machine.space(machine.parts.mms[number]), PlanOptions(orders="64K", max_ptes_none=0))
    object.__setattr__(plan, "ranges", Ranges.joined([]))
    ranges = SplitRanges(plan, [4])
    assert ranges.share.tolist() == [1.0] * len(plan.folios)
    assert ranges.price(0.0).copied == 64
    object.__setattr__(plan, "folios", Folios.joined([]))
    assert SplitRanges(plan, [4]).price(0.0).ranges == 0


@pytest.mark.parametrize(("orders", "split"), [("64K", True), ("2M", False)])
def test_mthp_plan_says_what_will_be_resident_after_splits(
    orders: str, split: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine, number = machine_with(2, 100)
    space = machine.space(machine.parts.mms[number])
    monkeypatch.setattr(targets, "open_target", lambda target, at=None: space)
    plan_command.command.main(["7", "--orders", orders, "--json"], standalone_mode=False)
    after = json.loads(capsys.readouterr().out)["rss_after_bytes"]
    plan_command.command.main(["7", "--orders", orders], standalone_mode=False)
    said = capsys.readouterr().out
    if split:
        collapse_space(space, PlanOptions(orders=orders), Means("split", max_bloat=None))
        assert after == resident_bytes(space)
        assert f"then {format_size(after)} of the process are resident" in said
    else:
        assert after is None
        assert "of the process are resident" not in said
