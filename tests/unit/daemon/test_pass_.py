"""One pass: which mechanism makes which orders, within which budgets, and what a trim returns."""

from __future__ import annotations

import pytest

from daemon_stage import (
    BLOCK,
    FULL,
    HALF,
    HUGE,
    START,
    G,
    N,
    Stage,
    Trimmable,
    samples,
    small_stage,
)
from fakes import FakeSpace, page_runs
from mthp.budget import Amount, MemoryBound
from mthp.daemon.target import LEFT_OUT_SECONDS, TRIM_SECONDS
from mthp.means import Mechanism
from mthp.objects import to_object
from mthp.ptes import ORDER_NONE, Pte
from mthp.results import ScanResult
from mthp.vma import Vma


def test_the_bloat_budget_is_never_overspent() -> None:
    hole = ((N - 100, Pte.PRESENT, 0), (100, 0, ORDER_NONE))
    budget = 250 * G.page_size
    stage = Stage(hole, FULL, hole, hole, hole, max_bloat=Amount(size=budget))
    stage.steps(5.0)
    assert stage.target.counters.bloat_bytes == 200 * G.page_size
    assert stage.collapsed == [1, 0, 2]
    stage.steps(3600.0)
    assert stage.target.counters.bloat_bytes <= budget
    assert stage.target.bloat_left == 50 * G.page_size


def test_a_share_of_bloat_is_of_what_is_resident() -> None:
    stage = Stage(HALF, max_bloat=Amount(share=0.001))
    stage.steps(5.0)
    assert stage.collapsed == []
    assert stage.target.bloat_left == int(0.001 * 50_000 * G.page_size)


def test_an_order_that_the_machine_has_no_folio_of_is_not_asked_for_again_and_again() -> None:
    stage = Stage(*[FULL] * 8)
    stage.space.fails = {START + at * G.pmd_size: ScanResult.ALLOC_HUGE_PAGE_FAIL for at in range(8)}
    stage.steps(0.9)
    first = len(stage.collapsed)
    assert 1 <= first <= 8
    stage.steps(300.0)
    assert len(stage.collapsed) <= 8 * 12
    stage.space.fails = {}
    stage.steps(1300.0)
    assert stage.target.counters.collapsed == {G.pmd_order: 8}


@pytest.mark.parametrize(("mechanism", "tried"), [("auto", 1), ("madvise", 1), ("move", 0)])
def test_a_mechanism_is_not_asked_for_orders_that_it_does_not_make(mechanism: str, tried: int) -> None:
    stage = Stage(FULL, mechanism=mechanism)
    stage.steps(5.0)
    assert len(stage.collapsed) == tried
    assert not stage.target.counters.failed


@pytest.mark.parametrize("disabled", [True, False])
def test_why_nothing_is_done_in_a_target_is_in_its_summary(disabled: bool) -> None:
    stage = Stage(FULL, FULL)
    size = 2 * G.pmd_size
    vma = Vma(START, START + size, "rw-p", flags=frozenset({"nh"}), has_anon_vma=True)
    stage.space = FakeSpace([(vma, *page_runs(*FULL, *FULL))], thp_disabled=disabled)
    stage.steps(2)
    (left,) = to_object(stage.target, G)["left_alone"]
    assert ("PR_SET_THP_DISABLE" if disabled else "MADV_NOHUGEPAGE") in left["reason"]
    assert (left["mappings"], left["bytes"]) == (1, size)
    assert to_object(stage.target, G)["collapsed_bytes"] == 0


def test_sizes_that_only_the_mover_makes_are_named_with_its_price() -> None:
    stage = Stage(FULL, orders=(4, 9))
    stage.steps(5.0)
    assert stage.collapsed == [0]
    assert stage.target.needs_move.startswith("64K: only the mover makes them")
    assert to_object(stage.target, G)["needs_move"] == stage.target.needs_move
    nothing = Stage(FULL, orders=(4,))
    nothing.steps(5.0)
    assert nothing.collapsed == []
    assert nothing.target.left_out.startswith("64K: only the mover makes them")


@pytest.mark.parametrize(("left", "collapsed"), [(64 << 20, []), ((66 << 20) - 1, []), (66 << 20, [0])])
def test_memory_that_must_stay_free_is_not_taken(left: int, collapsed: list[int]) -> None:
    stage = Stage(FULL)
    bounds = [MemoryBound("/sys/fs/cgroup/x", 400 << 20, left)]
    stage.space.memory_bounds = lambda: bounds  # type: ignore[attr-defined]
    stage.steps(5.0)
    assert stage.collapsed == collapsed
    assert any("must stay free" in reason for reason in stage.target.reasons) == (not collapsed)


def test_the_first_failed_charge_leaves_the_target_alone() -> None:
    stage = Stage(FULL, FULL, FULL)
    stage.space.fails = dict.fromkeys(range(START, START + 3 * G.pmd_size, G.pmd_size), ScanResult.CGROUP_CHARGE_FAIL)
    stage.steps(5.0)
    assert not stage.target.counters.collapsed
    assert stage.target.left_out.startswith("a charge failed")
    tried = len(stage.space.attempts)
    stage.steps(LEFT_OUT_SECONDS / 2)
    assert len(stage.space.attempts) == tried


def test_pages_of_zeroes_go_back_and_are_counted() -> None:
    stage = Stage(HUGE, trim=0.5)
    stage.space = Trimmable([(stage.space.vmas()[0], *page_runs(*HUGE))])
    stage.target.trim()
    wasted = (N - Trimmable.used) * G.page_size
    assert stage.target.counters.trimmed_bytes == stage.environment.total.trimmed_bytes == wasted
    assert samples(stage, stage.target)["mthp_service_trimmed_bytes_total", "all", "comm:seven"] == wasted
    assert stage.target.trim_at == stage.now + TRIM_SECONDS
    assert [event for event, values in stage.events if values.get("trimmed_bytes") == wasted] == ["trimmed"]


def test_a_space_that_cannot_be_trimmed_is_no_error() -> None:
    stage = Stage(HUGE, trim=0.5)
    stage.target.trim()
    assert [event for event, _ in stage.events] == ["trim_failed"]


def test_a_collapse_makes_nothing_that_a_trim_would_undo() -> None:
    # A third of the range is none: more than half of the share at which it would be trimmed.
    sparse = ((N - N // 3, int(Pte.PRESENT), 0), (N // 3, 0, ORDER_NONE))
    for trim, made in ((None, 1), (0.5, 0), (0.9, 1)):
        stage = Stage(sparse, orders=(G.pmd_order,), max_bloat=None, trim=trim)
        stage.steps(2)
        assert stage.target.counters.collapsed.total() == made


@pytest.mark.parametrize("mechanism", ["split", "khugepaged"])
def test_auto_makes_small_folios_by_what_the_machine_has(mechanism: Mechanism) -> None:
    stage = small_stage(mechanism, BLOCK, FULL, orders=(4, 9), max_ptes_none=0)
    stage.steps(5.0)
    assert stage.target.counters.collapsed == {4: 1, 9: 1}
    assert not stage.target.needs_move
    driven = [line for line in stage.said if "is driven" in line]
    assert len(driven) == (mechanism == "khugepaged"), "which concerns all processes"


def test_khugepaged_keeps_to_no_rate_so_a_rule_with_one_leaves_it_alone() -> None:
    stage = small_stage("khugepaged", BLOCK, orders=(4, 9), max_ptes_none=0, rate=1 << 30)
    stage.steps(5.0)
    assert not stage.target.counters.collapsed
    assert stage.target.needs_move.startswith("64K: only the mover")


def test_khugepaged_fills_nothing_while_a_budget_is_to_be_kept() -> None:
    hole = ((15, Pte.PRESENT, 0), (N - 15, 0, ORDER_NONE))
    for bloat, made in ((Amount(size=1 << 30), {}), (None, {4: 1})):
        stage = small_stage("khugepaged", hole, orders=(4,), max_bloat=bloat)
        stage.steps(5.0)
        assert stage.target.counters.collapsed == made


def test_what_only_the_mover_makes_is_said_once_and_not_for_every_pass() -> None:
    stage = Stage(FULL, orders=(4, 9))
    for _ in range(5):
        stage.process.faults += 1
        stage.steps(5.0)
    assert stage.target.counters.passes >= 5
    assert [line for line in stage.said if "only the mover" in line] == stage.said
    assert len(stage.said) == 1


def test_calls_that_make_several_folios_are_counted() -> None:
    stage = small_stage("split", BLOCK, orders=(4,), max_ptes_none=0)
    stage.steps(0.0)
    stage.steps(1.0)
    assert stage.target.counters.called.count == 1
