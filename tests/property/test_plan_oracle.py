"""The engine's plan equals that of the plain oracle, field by field, for every policy and geometry."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mthp
import oracle
from mthp.engine.plan import Plan, plan_planes
from mthp.engine.policy_lookup import policy_named
from mthp.geometry import GEOMETRIES
from mthp.results import ScanResult
from strategies import SMALL_SIZES, Problem, examples, planes_of, problems, rules, rules_of

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]

POLICIES = pytest.mark.parametrize("policy", sorted(oracle.POLICIES))


def check(problem: Problem, policy: str, *, omit_empty: bool) -> None:
    """Assert that engine and oracle agree on `problem` in every field of the plan."""
    plan = mthp.plan_ranges(policy=policy, **problem.arguments(omit_empty=omit_empty))
    expected = [oracle.plan(one, policy, problem.rules) for one in problem.ranges]
    attempts = [(index, *attempt) for index, one in enumerate(expected) for attempt in one.attempts]
    # Attempts first: where these differ, the other differences follow from it.
    assert readable(plan) == [(index, offset, order, result.name) for index, offset, order, result in attempts]
    assert [ScanResult(result).name for result in plan.scan_result] == [one.scan_result.name for one in expected]
    assert plan.orders.tolist() == [one.orders for one in expected]
    assert plan.copied.tolist() == [one.copied for one in expected]
    assert plan.filled.tolist() == [one.filled for one in expected]


def readable(plan: Plan) -> list[tuple[int, int, int, str]]:
    """Return the attempts as (range, offset, order, name of the result)."""
    columns = (plan.attempts.range, plan.attempts.offset, plan.attempts.order, plan.attempts.result)
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return [(index, offset, order, ScanResult(result).name) for index, offset, order, result in rows]


@POLICIES
@given(problem=problems(SMALL_SIZES), omit_empty=st.booleans())
@settings(max_examples=examples(100), suppress_health_check=SLOW)
def test_small_ranges(policy: str, problem: Problem, omit_empty: bool) -> None:
    check(problem, policy, omit_empty=omit_empty)


@POLICIES
@given(problem=problems((256, 512), max_ranges=3), omit_empty=st.booleans())
@settings(max_examples=examples(40), suppress_health_check=SLOW)
def test_ranges_of_4k_machines(policy: str, problem: Problem, omit_empty: bool) -> None:
    check(problem, policy, omit_empty=omit_empty)


@POLICIES
@pytest.mark.parametrize("size", [2048, 8192])
@given(data=st.data())
@settings(max_examples=examples(8), suppress_health_check=SLOW)
def test_ranges_of_big_page_machines(policy: str, size: int, data: st.DataObject) -> None:
    check(data.draw(problems((size,), max_ranges=1)), policy, omit_empty=False)


@POLICIES
@pytest.mark.parametrize("name", GEOMETRIES)
def test_every_geometry_with_random_columns(policy: str, name: str) -> None:
    """Dense random runs in more ranges than Hypothesis draws, for each machine by its name."""
    geometry = GEOMETRIES[name]
    size = geometry.ptes_per_pmd
    count = max(2, 4096 // size)
    chooser = np.random.default_rng(geometry.pmd_order)
    edges = chooser.random((count, size)) < 1 / 16
    present = (np.cumsum(edges, axis=1) + chooser.integers(0, 2, (count, 1))) % 4 != 0
    for none in (0, size // 3, size - 1):
        plan = mthp.plan_ranges(present, policy=policy, geometry=name, max_ptes_none=none)
        limits = oracle.Rules(frozenset(geometry.anon_orders), True, none, size // 8, size // 2)
        for index in range(count):
            expected = oracle.plan(oracle.Range.of_pages(present[index].astype(int).tolist()), policy, limits)
            assert plan.orders[index].tolist() == expected.orders
            assert plan.scan_result[index] == expected.scan_result


@POLICIES
@given(data=st.data())
@settings(max_examples=examples(40))
def test_every_pattern_of_a_few_pages(policy: str, data: st.DataObject) -> None:
    """All 65 536 patterns of 16 PTEs are too many for one example, so each takes 128 of them, and rules."""
    limits = data.draw(rules(16))
    patterns = data.draw(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=128, unique=True))
    drawn = [oracle.Range.of_pages([pattern >> bit & 1 for bit in range(16)]) for pattern in patterns]
    check(Problem(drawn, limits), policy, omit_empty=True)


@given(problem=problems(SMALL_SIZES), data=st.data())
@settings(max_examples=examples(60), suppress_health_check=SLOW)
def test_sizes_that_are_always_on(problem: Problem, data: st.DataObject) -> None:
    """Only the seed's second version asks which they are; a caller of plan_ranges cannot name them."""
    always = data.draw(st.frozensets(st.sampled_from(sorted(problem.rules.orders))))
    ours = replace(rules_of(problem), always=tuple(sorted(always)))
    theirs = replace(problem.rules, always=always)
    for policy in ("rfc2", "mainline"):
        for index, one in enumerate(problem.ranges):
            plan = plan_planes(planes_of(problem, index), policy_named(policy), ours)
            assert plan.orders.tolist() == [oracle.plan(one, policy, theirs).orders]
