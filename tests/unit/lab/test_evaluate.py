"""What settings make of a target, scan by scan: counted by hand where that can be done, and creep where it is due."""

from __future__ import annotations

import numpy as np
import pytest

import mthp
from fakes import FakeSpace, page_runs
from mthp.engine.select import PlanOptions
from mthp.errors import UsageError
from mthp.lab.compare import Comparison, compare, settings_of
from mthp.lab.evaluate import evaluate
from mthp.lab.figures import METRICS, Row, metric_of
from mthp.ptes import ORDER_NONE, Pte
from mthp.vma import Vma

P = int(Pte.PRESENT)
BASE = 0x7F00_0000_0000
RANGE = 2 << 20


def space_of(*runs: tuple[int, int, int]) -> FakeSpace:
    """Return one mapping of whole PMD ranges."""
    state, folio_order = page_runs(*runs)
    assert len(state) % 512 == 0
    return FakeSpace([(Vma(BASE, BASE + len(state) * 4096, "rw-p"), state, folio_order)])


def every_other_sixteen() -> FakeSpace:
    """Return one PMD range with only the first ten pages of each run of 16 in its first half."""
    runs = [(10, P, 0), (6, 0, ORDER_NONE)] * 16 + [(256, 0, ORDER_NONE)]
    return space_of(*runs)


def rows_of(space: FakeSpace, policy: str, max_ptes_none: int, scans: int | None = None) -> list[Row]:
    [outcome] = evaluate(space, [PlanOptions(policy=policy, max_ptes_none=max_ptes_none)], scans=scans)
    return outcome.rows()


def test_one_full_range_becomes_one_folio() -> None:
    before, after = rows_of(space_of((512, P, 0)), "mainline", 0, 1)
    assert (before["huge_coverage"], before["order_share_0"], before["translations"]) == (0.0, 1.0, 512)
    assert (after["huge_coverage"], after["order_share_9"], after["translations"]) == (1.0, 1.0, 1)
    assert after["resident_bytes"] == after["copied_bytes"] == RANGE
    assert after["bloat_bytes"] == after["creep_bytes"] == 0
    assert after["folios"] == 1
    assert after["tlb_reach_bytes"] == 1536 * RANGE


def test_bloat_is_counted_against_what_was_resident_before() -> None:
    _, after = rows_of(space_of((384, P, 0), (128, 0, ORDER_NONE)), "mainline", 511, 1)
    assert after["bloat_bytes"] == 128 << 12
    assert after["bloat_share"] == pytest.approx(128 / 384)
    assert after["resident_bytes"] == RANGE


def test_folios_that_are_there_keep_their_order_until_they_are_collapsed() -> None:
    space = space_of((16, P, 4), (496, 0, ORDER_NONE), (512, P | Pte.PMD_MAPPED, 9))
    before, after = rows_of(space, "mainline", 0, 1)
    for row in (before, after):
        assert row["order_share_4"] == pytest.approx(16 / 528)
        assert row["huge_coverage"] == pytest.approx(512 / 528)
        assert row["translations"] == 17
    assert after["folios"] == 0


def test_zero_and_swapped_pages_become_memory_and_only_the_zero_page_bloat() -> None:
    state = [(448, P, 0), (32, P | Pte.ZERO, 0), (32, int(Pte.SWAP), ORDER_NONE)]
    before, after = rows_of(space_of(*state), "mainline", 511, 1)
    assert before["resident_bytes"] == 448 << 12
    assert after["bloat_bytes"] == 32 << 12
    assert after["copied_bytes"] == 480 << 12
    assert after["resident_bytes"] == RANGE


def test_a_creeping_policy_creeps_and_ends_where_nothing_changes() -> None:
    rows = rows_of(every_other_sixteen(), "per-order", 256)
    creep = [row["creep_bytes"] >> 12 for row in rows]
    # 160 of the 256 pages of the first half are enough for order 8; full then, that half is enough for the whole.
    assert creep == [0, 96, 256, 0]
    assert rows[-1]["bloat_bytes"] >> 12 == 512 - 160
    assert rows[-1]["huge_coverage"] == 1.0


@pytest.mark.parametrize("policy", ["rfc", "per-order"])
@pytest.mark.parametrize("max_ptes_none", [128, 256, 384])
def test_our_own_policy_does_all_that_it_ever_does_in_the_first_scan(policy: str, max_ptes_none: int) -> None:
    space = every_other_sixteen()
    rows = rows_of(space, "no-creep", max_ptes_none)
    assert [row["creep_bytes"] for row in rows[2:]] == [0] * (len(rows) - 2)
    assert rows[-1]["bloat_bytes"] == rows[1]["bloat_bytes"]
    assert rows[-1]["bloat_bytes"] <= rows_of(space, policy, max_ptes_none)[-1]["bloat_bytes"]


def test_our_own_policy_fills_where_mainline_does_not() -> None:
    space = every_other_sixteen()
    ours, theirs = rows_of(space, "no-creep", 255)[-1], rows_of(space, "mainline", 255)[-1]
    assert ours["order_share_4"] + ours["order_share_5"] > 0 or ours["large_coverage"] == 1.0
    assert ours["large_coverage"] > theirs["large_coverage"]
    assert 0 < ours["bloat_bytes"] <= ours["copied_bytes"]


def test_the_first_scan_of_evaluate_is_the_plan() -> None:
    rng = np.random.default_rng(5)
    present = np.repeat(rng.random(512) < 0.6, 8)
    state = np.where(present, np.uint16(P), np.uint16(0))
    order = np.where(present, np.int8(0), np.int8(ORDER_NONE))
    space = FakeSpace([(Vma(BASE, BASE + len(state) * 4096, "rw-p"), state, order)])
    for policy in ("pmd-only", "rfc", "per-order", "mainline", "no-creep"):
        plan = mthp.plan_ranges(present.reshape(-1, 512), policy=policy, max_ptes_none=100)
        row = rows_of(space, policy, 100, 1)[1]
        assert row["bloat_bytes"] == int(plan.filled.sum()) << 12
        assert row["folios"] == len(plan.folios)
        resident = int(present.sum()) + int(plan.filled.sum())
        for k in range(10):
            assert row[f"order_share_{k}"] == pytest.approx(int((plan.orders == k).sum()) / resident)


def test_all_settings_of_one_call_have_the_same_number_of_scans() -> None:
    settings = settings_of(["mainline", "per-order"], max_ptes_none=[256])
    creeping = evaluate(every_other_sixteen(), settings, scans=None)
    assert len({len(outcome.scans) for outcome in creeping}) == 1
    fixed = evaluate(every_other_sixteen(), settings, scans=3)
    assert [len(outcome.scans) for outcome in fixed] == [4, 4]


def test_blocks_are_added_up_whatever_the_scans_that_each_takes() -> None:
    creeping = [(10, P, 0), (6, 0, ORDER_NONE)] * 16 + [(256, 0, ORDER_NONE)]
    space = space_of((512, P, 0), *creeping, (512, P, 0), *creeping)
    setting = PlanOptions(policy="per-order", max_ptes_none=256)
    [apart] = evaluate(space, [setting], scans=None, portion_ranges=1)
    assert apart.rows() == rows_of(space, "per-order", 256)


def test_every_column_that_is_no_setting_is_a_defined_metric() -> None:
    row = rows_of(space_of((512, P, 0)), "mainline", 0, 1)[0]
    figures = [column for column in row if column in METRICS or column.startswith("order_share_")]
    assert len(figures) == len(row) - len(("policy", "orders", "trigger", "mthp_min_order", "scan")) - 3
    assert all(metric_of(column).meaning for column in figures)


def compared(space: FakeSpace, *policies: str, scans: int | None = 1, covered: int | None = None) -> Comparison:
    return compare(space, settings_of(policies, max_ptes_none=[256]), scans=scans, covered=covered)


def test_the_frontier_leaves_out_what_another_beats() -> None:
    space = space_of((300, P, 0), (212, 0, ORDER_NONE))
    comparison = compared(space, "pmd-only", "mainline", "per-order")
    # All collapse the whole range: none beats another.
    assert comparison.frontier == [True, True, True]
    assert "pmd-only, mainline and per-order" in comparison.verdict[0]


def test_the_verdict_says_who_is_behind_whom() -> None:
    comparison = compared(every_other_sixteen(), "mainline", "no-creep", "per-order", scans=None, covered=4)
    text = " ".join(comparison.verdict)
    assert "On the frontier of 64K coverage against bloat" in text
    assert "Creep" in text
    assert "per-order (bloat" in text


def test_a_target_without_memory_has_a_verdict() -> None:
    comparison = compared(space_of((512, 0, ORDER_NONE)), "mainline", "rfc")
    assert "no policy has an effect" in comparison.verdict[0]
    assert all(row["huge_coverage"] == 0.0 for row in comparison.rows)


def test_settings_are_named_by_what_they_differ_in() -> None:
    space = space_of((512, P, 0))
    many = compare(space, settings_of(["rfc", "mainline"], max_ptes_none=[0, 64]))
    assert many.names == [
        "rfc max_ptes_none=0",
        "mainline max_ptes_none=0",
        "rfc max_ptes_none=64",
        "mainline max_ptes_none=64",
    ]
    assert compare(space, settings_of(["rfc", "mainline"])).names == ["rfc", "mainline"]


def test_what_cannot_be_compared_is_refused() -> None:
    space = space_of((512, P, 0))
    with pytest.raises(UsageError, match="no policy"):
        compare(space, [])
    with pytest.raises(UsageError, match="0 is not a number of scans"):
        compare(space, settings_of(["rfc"]), scans=0)
    with pytest.raises(UsageError, match="unknown policy 'nobody'"):
        compare(space, settings_of(["nobody"]))
