"""Memory in no whole PMD range: which mappings count, what is said of it, and what it takes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fakes import FakeSpace, page_runs
from mthp.cli.inspect_command import print_census
from mthp.cli.render.collapse import print_report
from mthp.cli.render.output import console
from mthp.cli.render.plan import print_allowed, print_plan
from mthp.eligibility import eligibility
from mthp.engine.allowed import allowed_of
from mthp.engine.census import take_census
from mthp.engine.collapse import collapse_space
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.engine.visit import Visit
from mthp.errors import UsageError
from mthp.geometry import X86_64, geometry_named
from mthp.means import Means
from mthp.measuring import out_of_reach_bytes
from mthp.ptes import Pte
from mthp.tunables import Switches
from mthp.vma import Vma, VmaKind

BASE, PAGE = 1 << 40, 4096
MOVABLE = frozenset({"rd", "wr", "mr", "mw", "me", "ac"})
ARENA = Vma(BASE, BASE + (1 << 20), "rw-p", flags=MOVABLE)


def full(*mappings: Vma, **options: Any) -> FakeSpace:
    return FakeSpace([(vma, *page_runs((vma.size // PAGE, Pte.PRESENT, 0))) for vma in mappings], **options)


def heap() -> FakeSpace:
    """Half an arena, another one beside it in the same PMD range, and one of 3 PMD ranges with two edges."""
    other = dataclasses.replace(ARENA, start=ARENA.end, end=ARENA.end + 5 * PAGE, flags=MOVABLE | {"hg"})
    large = Vma(BASE + (8 << 20) - 16 * PAGE, BASE + (10 << 20) + 8 * PAGE, "rw-p", flags=MOVABLE)
    return full(ARENA, other, large, orders=range(2, 10))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),
        ({"end": BASE + 4 * PAGE}, ""),
        ({"start": BASE + PAGE, "end": BASE + 7 * PAGE}, "holds no aligned 16K"),
        ({"end": BASE + 3 * PAGE}, "smaller than 16K"),
        ({"flags": MOVABLE | {"gd"}}, "the mover leaves it alone: it is a stack that grows (VM_GROWSDOWN)"),
        ({"name": "[stack]"}, "the mover leaves it alone: it is the stack of the first thread"),
        ({"permissions": "r--p"}, "the mover leaves it alone: it may not be both read and written"),
        ({"flags": MOVABLE | {"nh"}}, "MADV_NOHUGEPAGE is set"),
        ({"flags": MOVABLE | {"ht"}, "kind": VmaKind.HUGETLB}, "hugetlbfs pages"),
        ({"kind": VmaKind.SPECIAL}, "made by the kernel or a driver"),
        ({"kind": VmaKind.FILE}, "smaller than 2M"),
    ],
)
def test_which_small_mappings_count(changes: dict[str, Any], reason: str) -> None:
    vma = dataclasses.replace(ARENA, **changes)
    assert eligibility(vma, X86_64, Switches(), trigger="madvise", small=True).reason == reason
    if not reason:
        assert eligibility(vma, X86_64, Switches(), trigger="madvise").reason == "smaller than 2M"


def test_the_smallest_block_has_four_pages_of_any_size() -> None:
    geometry = geometry_named("arm64-16k")
    vma = Vma(BASE + 16384, BASE + 11 * 16384, "rw-p", flags=MOVABLE)
    space = FakeSpace([(vma, *page_runs((10, Pte.PRESENT, 0)))], geometry=geometry)
    plan = plan_space(space, PlanOptions(small=True))
    assert list(zip(plan.folios.address.tolist(), plan.folios.order.tolist(), strict=True)) == [(BASE + 65536, 2)]
    assert plan.before.out_of_reach_bytes(geometry) == 10 * 16384


def test_a_plan_without_it_is_as_ever() -> None:
    plan, small = (plan_space(heap(), PlanOptions(small=small, max_ptes_none=0)) for small in (False, True))
    assert plan.folios_by_order == {9: 1}
    assert small.folios_by_order == {9: 1, 8: 1, 4: 1, 3: 1, 2: 1}
    assert len(small.ranges) == len(plan.ranges) + 4
    assert [left.resident for left in plan.left] == [261 * PAGE, 24 * PAGE]
    assert not small.left
    assert plan.before.out_of_reach == small.before.out_of_reach == 256 + 5 + 16 + 8


@pytest.mark.parametrize("mechanism", ["auto", "madvise", "split", "khugepaged"])
def test_what_does_not_move_cannot(mechanism: Any) -> None:
    space = heap()
    with pytest.raises(UsageError) as refused:
        collapse_space(space, PlanOptions(small=True), Means(mechanism))
    assert "--small needs the mover" in refused.value.message
    assert "move" in (refused.value.help or "")
    assert not space.attempts


def test_every_command_says_what_is_out_of_reach(capsys: pytest.CaptureFixture[str]) -> None:
    """285 pages, in bytes, by the name of the way to reach them."""
    out = console()
    space = heap()
    print_census(out, take_census(space))
    print_report(out, collapse_space(space, PlanOptions(), dry_run=True))
    print_report(out, collapse_space(space, PlanOptions()))
    said = capsys.readouterr().out
    assert said.count("out of reach: 1.1M lie in no whole 2M range of their mapping") == 3
    assert "--small" in said
    census = take_census(space)
    assert census.anonymous.out_of_reach_bytes(X86_64) == 285 * PAGE
    assert [vma.anonymous.coverage.out_of_reach for vma in census.vmas] == [256, 5, 24]


def test_what_is_out_of_reach_is_counted_alone_as_with_everything() -> None:
    space = heap()
    assert out_of_reach_bytes(space) == take_census(space).anonymous.out_of_reach_bytes(X86_64) == 285 * PAGE


def test_a_visit_goes_over_whole_ranges() -> None:
    with pytest.raises(UsageError, match="whole PMD ranges"):
        Visit(heap(), PlanOptions(small=True))


def test_a_plan_says_which_command_makes_it(capsys: pytest.CaptureFixture[str]) -> None:
    plan = plan_space(heap(), PlanOptions(small=True))
    print_plan(console(), plan)
    print_allowed(console(), plan, allowed_of(heap(), plan, Means("madvise,move")))
    assert "mthp collapse --small --mechanism madvise,move would make 5 of these 5" in capsys.readouterr().out
