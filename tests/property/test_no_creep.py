"""Invariants of successive scans: the state between them, and the policy that never creeps."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from mthp.engine.plan import make_rules, plan_planes
from mthp.engine.planes import Planes
from mthp.engine.policy import Rules
from mthp.engine.policy_lookup import policy_named
from mthp.geometry import geometry_for_ptes
from mthp.lab.makers import Maker
from mthp.lab.scans import RangeState, carried_out, counted, history
from mthp.tunables import Tunables
from strategies import SMALL_SIZES, Problem, examples, problems

SIZES = (*SMALL_SIZES, 512)
LIMITS = ("max_ptes_none", "max_ptes_swap", "max_ptes_shared")
POLICIES = pytest.mark.parametrize("policy", ["mainline", "no-creep", "per-order", "pmd-only", "rfc"])


def posed(problem: Problem) -> tuple[Planes, Rules]:
    """Return the planes and rules of a problem."""
    arguments: dict[str, Any] = problem.arguments()
    geometry = geometry_for_ptes(problem.ranges[0].size)
    limits = {name: arguments.pop(name) for name in LIMITS}
    rules = make_rules(
        geometry,
        orders=arguments.pop("orders"),
        trigger=arguments.pop("trigger"),
        tunables=Tunables.defaults(geometry).replaced(geometry, **limits),
        mthp_min_order=arguments.pop("mthp_min_order"),
    )
    return Planes.checked(arguments.pop("present"), arguments), rules


@given(problem=problems(SIZES))
@settings(max_examples=examples(50))
def test_no_scan_after_the_first_fills_anything(problem: Problem) -> None:
    planes, rules = posed(problem)
    scans = history(RangeState(planes), Maker.named("no-creep"), rules, 8)
    assert {scan.filled for scan in scans[1:]} == {scans[1].filled}


@given(problem=problems(SIZES))
@settings(max_examples=examples(40))
def test_every_folio_holds_more_of_the_programs_own_than_its_limit_leaves(problem: Problem) -> None:
    planes, rules = posed(problem)
    policy = policy_named("no-creep")
    plan = plan_planes(planes, policy, rules)
    if not rules.forced:
        for order, filled in zip(plan.folios.order.tolist(), plan.folios.filled.tolist(), strict=True):
            assert filled <= rules.tunables.max_ptes_none >> (rules.geometry.pmd_order - order)


@POLICIES
@given(problem=problems(SIZES))
@settings(max_examples=examples(30))
def test_what_a_plan_says_is_what_is_there_once_it_is_carried_out(policy: str, problem: Problem) -> None:
    planes, rules = posed(problem)
    plan = plan_planes(planes, policy_named(policy), rules)
    after = carried_out(planes, plan.made, plan.geometry)
    resident = after.occupied
    assert np.array_equal(np.where(resident, plan.orders, -1) >= 0, resident)
    made = plan.made != 0
    assert after.folio_order is not None
    assert np.array_equal(after.folio_order[made], plan.orders[made])
    assert resident[made].all()
    assert after.filled is not None
    assert int(np.count_nonzero(after.filled)) == int(plan.filled.sum())
    assert int(counted(after, plan.geometry).by_order.sum()) == int(np.count_nonzero(resident))
    outside = ~made
    assert np.array_equal(after.present[outside], planes.present[outside])


@POLICIES
@given(problem=problems(SIZES, max_ranges=3))
@settings(max_examples=examples(40))
def test_memory_only_grows_by_what_is_filled(policy: str, problem: Problem) -> None:
    planes, rules = posed(problem)
    before = counted(planes, rules.geometry)
    scans = history(RangeState(planes), Maker.named(policy), rules, 8)
    swapped = 0 if planes.swap is None else int(np.count_nonzero(planes.swap))
    for last, scan in itertools.pairwise(scans):
        assert scan.filled >= last.filled
        grown = int(scan.by_order.sum() - before.by_order.sum())
        assert scan.filled <= grown <= scan.filled + swapped
