"""The walk over one PMD range makes the attempts that a plan predicts, one by one, if each ends as predicted."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mthp
from mthp.engine.bits import Bits
from mthp.engine.checks import PolicyChecks, scan_results
from mthp.engine.occupancy import Runs
from mthp.engine.planes import Planes
from mthp.engine.policy import BUILT_IN, Limits, Policy, Rules
from mthp.engine.walk import Walk
from mthp.geometry import GEOMETRIES
from mthp.results import ScanResult
from mthp.sim.collapse.fullness import Fullness
from mthp.sim.collapse.single_pmd import RangeScan, collapse_single_pmd
from strategies import SMALL_SIZES, Problem, examples, planes_of, problems, rules_of

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


class Neighbourly(Policy):
    """A user's policy: two thirds full, without a folio of half the size; swap and shared pages in proportion."""

    name = "neighbourly"

    def limits(self, order: int, rules: Rules) -> Limits:
        size = 1 << order
        return Limits(size // 3, size // 8, size // 2)

    def full_enough(self, runs: Runs, rules: Rules) -> Bits | None:
        enough: Bits = runs.occupied + runs.swap >= runs.size - runs.size // 3
        largest = runs.largest_folio
        return enough if largest is None else enough & (largest < runs.order - 1)


class Impatient(Neighbourly):
    """The same, every run scanned for itself, so that the first failure at the smallest order ends the range."""

    name = "impatient"
    scans_each_run: ClassVar[bool] = True
    fail_ends_range: ClassVar[bool] = False


POLICIES = {**{name: policy() for name, policy in BUILT_IN.items()}, "own": Neighbourly(), "own-scans": Impatient()}


class Page:
    """One PMD range with attempts that end as its planes say, and that it records."""

    as_it_was = False

    def __init__(self, planes: Planes, policy: Policy, rules: Rules) -> None:
        self.planes, self.rules = planes, rules
        self.walk = Walk(planes, PolicyChecks(policy, rules))
        self.fullness = Fullness(self.walk.occupancy, policy, rules)
        self.attempts: list[tuple[int, int, str]] = []
        self.result: ScanResult | None = None

    def scan_pmd(self, address: int) -> RangeScan:
        result = ScanResult(int(self.walk.scanned()[0]))
        return RangeScan(result, self.fullness if result is ScanResult.SUCCEED else None)

    def _checked(self, address: int, order: int) -> ScanResult:
        where = np.array([0]), np.array([address // self.rules.geometry.page_size])
        return ScanResult(int(scan_results(self.planes, order, *where, self.walk.checks.attempt(order))[0]))

    def scan_run(self, address: int, order: int) -> RangeScan:
        result = self._checked(address, order)
        if result is ScanResult.PTE_MAPPED_HUGEPAGE:
            # A plan shows it among the attempts.
            self.attempts.append((address // self.rules.geometry.page_size, order, result.name))
        # A guard marker passes a scan, and makes the attempt fail.
        return RangeScan(ScanResult.SUCCEED if result is ScanResult.FAIL else result)

    def collapse_huge_page(self, address: int, order: int, scan: RangeScan) -> ScanResult:
        result = self._checked(address, order)
        self.attempts.append((address // self.rules.geometry.page_size, order, result.name))
        return result

    def scanned(self, address: int, scan: RangeScan, result: ScanResult) -> None:
        self.result = result


def check(problem: Problem, policy: Policy) -> None:
    plan = mthp.plan_ranges(policy=policy, **problem.arguments())
    found = plan.attempts
    rules = rules_of(problem)
    for index in range(len(problem.ranges)):
        page = Page(planes_of(problem, index), policy, rules)
        result = collapse_single_pmd(page, 0, policy, rules)
        mine = found.range == index
        rows = zip(found.offset[mine].tolist(), found.order[mine].tolist(), found.result[mine].tolist(), strict=True)
        assert page.attempts == [(offset, order, ScanResult(what).name) for offset, order, what in rows]
        assert (result is ScanResult.SUCCEED) == (plan.scan_result[index] == ScanResult.SUCCEED)
        assert page.result is result


BY_POLICY = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)


@BY_POLICY
@given(problem=problems(SMALL_SIZES))
@settings(max_examples=examples(70), suppress_health_check=SLOW)
def test_small_ranges(policy: Policy, problem: Problem) -> None:
    check(problem, policy)


@BY_POLICY
@pytest.mark.parametrize("size", sorted({geometry.ptes_per_pmd for geometry in GEOMETRIES.values()}))
@given(data=st.data())
@settings(max_examples=examples(8), suppress_health_check=SLOW)
def test_ranges_of_every_machine(policy: Policy, size: int, data: st.DataObject) -> None:
    check(data.draw(problems((size,), max_ranges=1)), policy)
