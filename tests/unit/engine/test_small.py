"""Memory in no whole PMD range: which mappings count, its messages, and its requirements."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from fakes import FakeSpace, page_runs
from mthp.cli.inspect_command import print_census
from mthp.cli.render.outcomes import print_report
from mthp.cli.render.output import console
from mthp.cli.render.planned import print_allowed, print_plan
from mthp.eligibility import eligibility
from mthp.engine.allowed import allowed_of
from mthp.engine.census import take_census
from mthp.engine.collapse import collapse_space
from mthp.engine.explain import explain_space
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.engine.verify import Expectation, verify_space
from mthp.engine.visit import Visit
from mthp.errors import UsageError
from mthp.geometry import X86_64, geometry_named
from mthp.lab.compare import compare, settings_of
from mthp.lab.grid import Grid
from mthp.lab.sweep import Task, measure
from mthp.means import Means
from mthp.measuring import out_of_reach_bytes
from mthp.objects import to_object
from mthp.ptes import Pte
from mthp.report.gather import Source, report_on
from mthp.snapshot import record
from mthp.top.looks import mappings
from mthp.top.screens import plan_text
from mthp.tunables import Switches
from mthp.vma import Vma, VmaKind

BASE, PAGE = 1 << 40, 4096
MOVABLE = frozenset({"rd", "wr", "mr", "mw", "me", "ac"})
ARENA = Vma(BASE, BASE + (1 << 20), "rw-p", flags=MOVABLE)


def full(*mappings: Vma, **options: Any) -> FakeSpace:
    return FakeSpace([(vma, *page_runs((vma.size // PAGE, Pte.PRESENT, 0))) for vma in mappings], **options)


def heap() -> FakeSpace:
    """Half an arena, another in the same PMD range, and one of 3 PMD ranges with two edges."""
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


def test_a_collapse_by_the_mover_does_not_recommend_it(capsys: pytest.CaptureFixture[str]) -> None:
    means = Means(mechanism="move", fill=True)
    print_report(console(), collapse_space(heap(), PlanOptions(small=True), means))
    said = capsys.readouterr().out
    assert "No kernel collapses them" in said
    assert "--small --mechanism move" not in said


OUTSIDE = 285 * PAGE
TOLD = "1.1M lie in no whole 2M range of their mapping"


def test_a_failed_expectation_and_its_result_say_it() -> None:
    done = verify_space(heap(), [Expectation.parse("2M>=95%"), Expectation.parse("16K>=0%")])
    assert done.out_of_reach_bytes == to_object(done)["out_of_reach_bytes"] == OUTSIDE
    failed, passed = done.checks
    assert failed.reason.endswith(f"; 1.1M of it {TOLD.removeprefix('1.1M ')}")
    assert passed.verdict == "passed"


def test_an_explanation_says_it_of_a_process_and_of_an_address() -> None:
    process, small, whole = (explain_space(heap(), at) for at in (None, BASE, BASE + (8 << 20)))
    assert (process.out_of_reach_bytes, small.out_of_reach_bytes, whole.out_of_reach_bytes) == (OUTSIDE, 256 * PAGE, 0)
    assert any(TOLD in line for line in process.memory)
    assert any("1M lie in no whole 2M range" in line for line in small.memory)
    assert not any("no whole" in line for line in whole.sentences)


def test_top_says_it_of_the_chosen_row() -> None:
    rows = mappings(heap(), PlanOptions())
    assert [row.out_of_reach for row in rows] == [256 * PAGE, 5 * PAGE, 24 * PAGE]
    assert "1M in no whole 2M range: mthp collapse --small" in plan_text(rows[0], X86_64, "mainline").plain


def test_a_report_says_it() -> None:
    page = report_on(Source(heap(), "now"), PlanOptions(), [])
    assert any(TOLD in section.lead for section in page.sections)


def test_a_comparison_and_a_sweep_say_it(tmp_path: Path) -> None:
    choice = settings_of(["mainline"])
    assert to_object(compare(heap(), choice))["out_of_reach_bytes"] == OUTSIDE
    path = tmp_path / "heap.parquet"
    record(heap(), path)
    done = measure(Task(str(path), "heap", Grid(policies=("mainline",))))
    rows = pytest.importorskip("pyarrow").ipc.open_file(done.table).read_all().to_pylist()
    assert {row["out_of_reach_bytes"] for row in rows} == {OUTSIDE}


def test_commands_over_several_targets_add_it_up(tmp_path: Path) -> None:
    from e2e.helpers import mthp

    for name in ("one", "two"):
        record(heap(), tmp_path / name)
    for command in (["inspect"], ["plan"], ["verify", "--expect", "2M>=1%"]):
        said = mthp(*command, tmp_path / "one", tmp_path / "two").stdout
        assert "2.2M lie in no whole 2M range of their mapping" in " ".join(said.split())


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
