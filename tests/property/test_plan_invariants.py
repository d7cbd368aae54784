"""What holds for a plan of any policy, whatever it decided: said without the help of the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mthp
from mthp.engine.plan import Plan
from mthp.geometry import MIN_ANON_ORDER
from mthp.results import ScanResult
from oracle import Range
from strategies import SMALL_SIZES, Problem, examples, problems

POLICIES = pytest.mark.parametrize("policy", ["mainline", "no-creep", "per-order", "pmd-only", "rfc", "rfc2"])
SIZES = (*SMALL_SIZES, 256, 512)


def planned(problem: Problem, policy: str) -> Plan:
    return mthp.plan_ranges(policy=policy, **problem.arguments())


def collapsed_runs(plan: Plan) -> list[tuple[int, int, int]]:
    """(range, offset, order) of the attempts that succeed."""
    chosen = plan.attempts.result == ScanResult.SUCCEED
    columns = (plan.attempts.range, plan.attempts.offset, plan.attempts.order)
    return list(zip(*(column[chosen].tolist() for column in columns), strict=True))


def runs_are_aligned_disjoint_and_inside(plan: Plan, problem: Problem) -> None:
    size = problem.ranges[0].size
    taken = np.zeros((len(problem.ranges), size), dtype=int)
    for index, offset, order in collapsed_runs(plan):
        assert 0 <= index < len(problem.ranges)
        assert 0 <= offset <= size - (1 << order)
        assert offset % (1 << order) == 0
        assert order in problem.rules.orders or not problem.rules.khugepaged
        assert order >= MIN_ANON_ORDER
        taken[index, offset : offset + (1 << order)] += 1
    assert taken.max() <= 1


def copied_and_filled_pages_make_up_the_runs(plan: Plan, problem: Problem) -> None:
    for index, one in enumerate(problem.ranges):
        runs = [(offset, order) for where, offset, order in collapsed_runs(plan) if where == index]
        inside = [i for offset, order in runs for i in range(offset, offset + (1 << order))]
        filled = sum(not one.has_contents(i) for i in inside)
        assert plan.filled[index] == filled
        assert plan.copied[index] == len(inside) - filled


def orders_agree_with_the_attempts(plan: Plan, problem: Problem) -> None:
    expected = np.array(
        [
            [one.folio_order[i] if one.is_page(i) else 0 if one.zero[i] else -1 for i in range(one.size)]
            for one in problem.ranges
        ]
    )
    for index, offset, order in collapsed_runs(plan):
        expected[index, offset : offset + (1 << order)] = order
    assert plan.orders.dtype == np.int8
    assert np.array_equal(plan.orders, expected)


def only_a_range_that_succeeds_is_changed(plan: Plan, problem: Problem) -> None:
    changed = {index for index, _, _ in collapsed_runs(plan)}
    assert changed == {index for index, result in enumerate(plan.scan_result) if result == ScanResult.SUCCEED}
    for index, one in enumerate(problem.ranges):
        if one.pmd_mapped or not any(one.is_page(i) or one.swap[i] for i in range(one.size)):
            assert index not in changed
        if plan.policy != "per-order" and any(one.uffd[i] and one.has_contents(i) for i in range(one.size)):
            assert index not in changed


def a_range_armed_with_userfaultfd_is_never_filled(plan: Plan, problem: Problem) -> None:
    armed = np.array([one.uffd_armed for one in problem.ranges])
    assert not plan.filled[armed].any()


def an_existing_folio_is_never_replaced_by_a_smaller_or_equal_one(plan: Plan, problem: Problem) -> None:
    for index, offset, order in collapsed_runs(plan):
        one = problem.ranges[index]
        if order < one.pmd_order:
            run = range(offset, offset + (1 << order))
            assert all(one.folio_order[i] < order for i in run if one.is_page(i))


def attempts_are_listed_by_range_and_never_go_back(plan: Plan, problem: Problem) -> None:
    attempts = plan.attempts
    places = list(zip(attempts.range.tolist(), attempts.offset.tolist(), (-attempts.order).tolist(), strict=True))
    assert places == sorted(set(places))


INVARIANTS = [
    runs_are_aligned_disjoint_and_inside,
    copied_and_filled_pages_make_up_the_runs,
    orders_agree_with_the_attempts,
    only_a_range_that_succeeds_is_changed,
    a_range_armed_with_userfaultfd_is_never_filled,
    an_existing_folio_is_never_replaced_by_a_smaller_or_equal_one,
    attempts_are_listed_by_range_and_never_go_back,
]


@POLICIES
@given(problem=problems(SIZES))
@settings(max_examples=examples(40))
def test_every_plan_holds_together(policy: str, problem: Problem) -> None:
    plan = planned(problem, policy)
    for invariant in INVARIANTS:
        invariant(plan, problem)


@POLICIES
@given(problem=problems(SIZES, max_ranges=6), data=st.data())
@settings(max_examples=examples(40))
def test_a_range_is_planned_the_same_alone_and_among_others(policy: str, problem: Problem, data: st.DataObject) -> None:
    together = planned(problem, policy)
    index = data.draw(st.integers(0, len(problem.ranges) - 1))
    alone = planned(Problem([problem.ranges[index]], problem.rules), policy)
    assert np.array_equal(alone.orders[0], together.orders[index])
    assert alone.scan_result[0] == together.scan_result[index]
    assert alone.copied[0] == together.copied[index]
    assert alone.filled[0] == together.filled[index]


@given(problem=problems(SIZES))
@settings(max_examples=examples(40))
def test_mainline_does_not_creep(problem: Problem) -> None:
    """With an intermediate max_ptes_none a run below the PMD order is never filled, so it cannot look fuller later."""
    if problem.rules.max_ptes_none == problem.ranges[0].size - 1:
        return
    plan = planned(problem, "mainline")
    whole = (plan.orders == problem.ranges[0].pmd_order).all(axis=1)
    assert not plan.filled[~whole].any()


@POLICIES
@given(problem=problems(SIZES))
@settings(max_examples=examples(80))
def test_properties_of_pages_mean_nothing_where_there_is_no_page(policy: str, problem: Problem) -> None:
    """They are set wherever a PTE maps no page of its own; the same runs must be collapsed, to the same orders."""
    strewn = Problem([with_meaningless_bits(one) for one in problem.ranges], problem.rules)
    plain, other = planned(problem, policy), planned(strewn, policy)
    assert other.scan_result.tolist() == plain.scan_result.tolist()
    assert other.attempts.result.tolist() == plain.attempts.result.tolist()
    assert collapsed_runs(other) == collapsed_runs(plain)
    for index, offset, order in collapsed_runs(plain):
        assert other.orders[index, offset : offset + (1 << order)].tolist() == [order] * (1 << order)


def with_meaningless_bits(one: Range) -> Range:
    """`one` with every bit set, and the largest folio order, where they say nothing."""
    every = range(one.size)
    return replace(
        one,
        shared=[one.shared[i] if one.is_page(i) else 1 for i in every],
        lazyfree=[one.lazyfree[i] if one.is_page(i) else 1 for i in every],
        unreferenced=[one.unreferenced[i] if one.is_page(i) else 1 for i in every],
        uffd=[one.uffd[i] if one.has_contents(i) else 1 for i in every],
        folio_order=[one.folio_order[i] if one.is_page(i) else one.pmd_order for i in every],
    )
