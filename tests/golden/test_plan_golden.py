"""Plans against what real kernels did, page by page and attempt by attempt.

`mainline` is compared with kernels of 7.2 and later, `rfc`, `rfc2` and `per-order` with kernels with their series.

A plan is a pure function of the PTEs. Three things that the recorded machines had are not in its planes. The tests set
the cases that meet them aside, and detect them from the recording, never from a wrong plan:

- *Pinned pages.* A pin is an extra reference; the kernel's scan ends the range at it.
- *The LRU batch.* The small folios that a failed isolation had taken go back through the CPU's batch, which holds an
  extra reference for a while, so that the next, smaller attempt may find PAGE_COUNT (lesson 1 of ``README.md``).
  The kernel recorded that word, and up to there the attempts must agree all the same.
- *Swap entries read back for nothing.* An attempt at the PMD order reads them back before a guard marker stops it, or
  isolation at a none PTE of a VMA that is armed with userfaultfd. They are base pages then; a plan leaves them in swap.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import mthp
from golden.loader import ANON_FILES, SERIES, STATES_FILE, Case, load, series_file
from mthp.engine.plan import Plan
from mthp.results import ScanResult

Attempt = tuple[int, str]
"""Order, and the trace event's word for the result."""

BATCH_WORD = ScanResult.PAGE_COUNT.trace_word


def plan_together(cases: list[Case], policy: str = "mainline") -> Plan:
    """Return one plan over `cases`, which have rules and geometry in common."""
    first = cases[0]
    planes = [case.planes() for case in cases]
    joined: dict[str, Any] = {name: np.concatenate([one[name] for one in planes]) for name in planes[0]}
    return mthp.plan_ranges(
        policy=policy,
        geometry=first.geometry,
        orders=first.orders,
        trigger=first.trigger,
        uffd_armed=np.array([case.uffd_armed for case in cases]),
        droppable=np.array([case.droppable for case in cases]),
        **first.limits,
        **joined,
    )


def by_rules(cases: list[Case]) -> list[list[Case]]:
    """Return the cases in groups that one call can plan."""
    groups: dict[object, list[Case]] = defaultdict(list)
    for case in cases:
        groups[case.geometry, case.orders, case.trigger, *case.limits.values()].append(case)
    return list(groups.values())


@pytest.mark.parametrize(("name", "count"), list(zip(ANON_FILES, (959, 240, 600), strict=True)))
def test_every_case_of_pages_and_holes(name: str, count: int) -> None:
    cases = load(name)
    assert len(cases) == count
    wrong = []
    for group in by_rules(cases):
        plan = plan_together(group)
        wrong += [case.id for case, orders in zip(group, plan.orders, strict=True) if orders.tolist() != case.after]
    assert wrong == []


def attempts_by_case(plan: Plan) -> list[list[Attempt]]:
    """Return the attempts of a plan, for each of its ranges."""
    attempts: list[list[Attempt]] = [[] for _ in range(len(plan))]
    columns = (plan.attempts.range, plan.attempts.order, plan.attempts.result)
    for index, order, result in zip(*(column.tolist() for column in columns), strict=True):
        attempts[index].append((order, ScanResult(result).trace_word))
    return attempts


@pytest.mark.parametrize("series", SERIES)
@pytest.mark.parametrize(("kind", "least"), [("anon", 240), ("states", 60)])
def test_every_case_of_a_series_that_a_plan_can_foresee(series: str, kind: str, least: int) -> None:
    """Not swap, which a failed attempt reads back, nor large folios, after which a series leaves the alignment."""
    beyond = ("swap", "large") if kind == "states" else ()
    cases = [
        case
        for case in load(series_file(series, kind))
        if not any(word == BATCH_WORD for _, word in case.attempts)
        and not any(state.startswith(beyond) for state in set(case.before))
    ]
    assert len(cases) >= least
    wrong = []
    for group in by_rules(cases):
        plan = plan_together(group, SERIES[series])
        for case, orders, attempts in zip(group, plan.orders.tolist(), attempts_by_case(plan), strict=True):
            # The seed allocates for orders that are off, and fails: no attempt to a plan.
            recorded = [attempt for attempt in case.attempts if attempt[1] != ScanResult.VMA_CHECK.trace_word]
            wrong += [case.id] if orders != case.after or attempts != recorded else []
    assert wrong == []


@dataclass(frozen=True)
class Foreseen:
    """The plan of one case.

    Attributes:
        case: the recording.
        orders: the plan's row of orders.
        attempts: the plan's attempts.
        scan_result: the plan's.
    """

    case: Case
    orders: list[int]
    attempts: list[Attempt]
    scan_result: ScanResult

    @property
    def kernel_word(self) -> str:
        """Return the word that a kernel would trace for the range.

        A plan names the last attempt's result. To the kernel a run skipped for its large folio is none
        (mthp_collapse keeps the last result before it, at first FAIL).
        """
        if self.attempts and self.scan_result != ScanResult.SUCCEED:
            words = [word for _, word in self.attempts if word != ScanResult.PTE_MAPPED_HUGEPAGE.trace_word]
            return words[-1] if words else ScanResult.FAIL.trace_word
        return self.scan_result.trace_word


@functools.cache
def states() -> list[Foreseen]:
    """Return the cases of all states."""
    foreseen = []
    for group in by_rules(load(STATES_FILE)):
        plan = plan_together(group)
        attempts = attempts_by_case(plan)
        results = map(ScanResult, plan.scan_result.tolist())
        foreseen += list(map(Foreseen, group, plan.orders.tolist(), attempts, results))
    return foreseen


def beyond_a_plan(case: Case) -> str:
    """Return the fact of the case that planes cannot have; ``""`` if there is none."""
    if "pinned" in case.before:
        return "pinned"
    if any(word == BATCH_WORD for _, word in case.attempts):
        return "batch"
    if not case.tried_whole_range:
        return ""
    # A failed attempt at the PMD order has read swap entries back before it met what stopped it.
    failed = case.attempts[0][1] != ScanResult.SUCCEED.trace_word
    return "read back" if failed and {"swap", "swap_shared"} & set(case.before) else ""


def within_a_plan(*also: str) -> list[Foreseen]:
    """Return the states that a plan can foresee, and those set aside for a reason of `also`."""
    return [one for one in states() if beyond_a_plan(one.case) in ("", *also)]


@pytest.mark.slow
def test_few_of_the_states_are_beyond_a_plan() -> None:
    reasons = Counter(beyond_a_plan(one.case) for one in states())
    assert reasons == {"": 3638, "batch": 133, "pinned": 124, "read back": 29}


def test_every_other_case_of_states_page_by_page() -> None:
    assert [one.case.id for one in within_a_plan() if one.orders != one.case.after] == []


def test_every_other_case_of_states_attempt_by_attempt() -> None:
    assert [one.case.id for one in within_a_plan("read back") if one.attempts != one.case.attempts] == []


def test_scan_results_are_the_words_that_the_kernel_traced() -> None:
    scanned = [one for one in within_a_plan("read back") if one.case.scanned]
    assert len(scanned) > 3500
    assert [one.case.id for one in scanned if one.kernel_word != one.case.scan_result] == []


def test_attempts_agree_up_to_the_first_that_the_lru_batch_spoils() -> None:
    wrong = []
    for one in states():
        if beyond_a_plan(one.case) == "batch":
            spoilt = [word for _, word in one.case.attempts].index(BATCH_WORD)
            if one.attempts[:spoilt] != one.case.attempts[:spoilt] or len(one.attempts) <= spoilt:
                wrong.append(one.case.id)
    assert wrong == []


def test_what_the_kernel_does_not_scan_is_not_collapsed() -> None:
    unscanned = [one for one in states() if not one.case.scanned]
    assert len(unscanned) == 61
    assert [one.case.id for one in unscanned if one.attempts] == []
