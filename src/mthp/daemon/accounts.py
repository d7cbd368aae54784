"""Counting of the work in a target, for the target, its service and the whole daemon."""

from __future__ import annotations

from collections import Counter

import numpy as np

from mthp.abilities import take_calls, take_pauses
from mthp.addrspace import AddressSpace
from mthp.daemon.environment import Environment
from mthp.daemon.telemetry import Counters, RuleCounters, ServiceCounters
from mthp.engine.visited import Passage
from mthp.naming import ProcessFacts
from mthp.results import ScanResult


def account(
    environment: Environment,
    counters: Counters,
    service: ServiceCounters,
    facts: ProcessFacts,
    space: AddressSpace,
    passage: Passage,
) -> int:
    """Count the work of a passage over some PMD ranges; return the bytes in the folios that it made.

    Args:
        counters, service: counters of the target.
        space: address space of the target, which hands over its pauses and calls.
    """
    geometry = environment.geometry
    made: Counter[int] = Counter()
    failed: Counter[ScanResult] = Counter()
    rule = environment.services.rules.setdefault(service.rule, RuleCounters())
    copied = filled = 0
    calls = take_calls(space)
    for attempt in passage.attempts:
        added = attempt.left_filled + (attempt.filled if attempt.result is ScanResult.SUCCEED else 0)
        filled += added
        rule.bloat_bytes[attempt.order] += added * geometry.page_size
        if attempt.result is ScanResult.SUCCEED:
            made[attempt.order] += 1
            copied += attempt.copied
            environment.free.given(attempt.order)
        elif attempt.result is not ScanResult.PTE_MAPPED_HUGEPAGE:
            failed[attempt.result] += 1
            rule.failed[attempt.order] += 1
            if attempt.result is ScanResult.ALLOC_HUGE_PAGE_FAIL and attempt.elapsed_ns:
                environment.free.refused(attempt.order, environment.tunables.alloc_sleep_millisecs / 1000)
        if attempt.order == geometry.pmd_order and attempt.elapsed_ns:
            calls.append(attempt.elapsed_ns)
    pauses = take_pauses(space)
    rule.collapsed.update(made)
    results = {ScanResult(index): count for index, count in enumerate(np.bincount(passage.results).tolist()) if count}
    for one in (counters, environment.total):
        one.collapsed.update(made)
        one.failed.update(failed)
        one.ranges.update(results)
        one.scanned_ptes += passage.progress
        one.copied_bytes += copied * geometry.page_size
        one.bloat_bytes += filled * geometry.page_size
        one.stopped.add(pauses)
        one.called.add(calls)
    size = sum(geometry.size_of(order) * count for order, count in made.items())
    service.collapsed_bytes += size
    service.bloat_bytes += filled * geometry.page_size
    if made or failed:
        environment.event(
            "collapsed" if made else "failed",
            pid=facts.pid,
            comm=facts.comm,
            folios={geometry.label(order): count for order, count in sorted(made.items())},
            failed={result.name: count for result, count in failed.items()},
            copied_bytes=copied * geometry.page_size,
            bloat_bytes=filled * geometry.page_size,
            max_pause_seconds=max(pauses, default=0) / 1e9,
        )
    return size
