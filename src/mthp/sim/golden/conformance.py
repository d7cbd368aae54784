"""Replay of golden cases: stage the state, trigger, and compare with the record.

A case (one JSON object of a golden file) is one PMD range of one mapping, and up to three passes of khugepaged, or
calls of MADV_COLLAPSE, with everything that the kernel shows of them: the order of the folio at every page, the scan's
result and its counts, the trace events in order, the counters, which pages moved, their flags, the swap slots still in
use. The machine itself tracks contents. :mod:`mthp.sim.golden.stage` builds the state; from then on the machine does
not use the case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from mthp.engine.policy import Policy
from mthp.results import ScanResult
from mthp.sim.golden.cases import Case, Runs, ScanRecord, case_of, expanded, runs_of
from mthp.sim.golden.differences import difference
from mthp.sim.golden.stage import Observation, Stage
from mthp.sim.kernel import MTHP_COLLAPSE, NO_PTE_TABLE, SWPIN, Kernel, Release, kernel_of, policy_of
from mthp.sim.trace import Collapse, Event, Isolate, ScanPmd, Swapin

_OF_OTHERS = "thp_split_pmd"
"""A counter of the whole machine that no scan changes: in a recorded scan, other processes changed it."""

_UNRECORDED = re.compile("pgfault|fault_|munlocked|cleared")
"""Counters that the recorder leaves out, because other processes change them."""

_SINCE_MTHP_COLLAPSE = re.compile("hugepages-[0-9]+kB/collapse_.*")
"""The counters added with collapse to orders below the PMD order."""

ANON_COLLAPSE_ALLOC = "jain-rfc-2024-12"
"""The series that counts folios allocated below the PMD order in anon_collapse_alloc of their size."""

_OLD_WORDS = {"pmd_none": "no_pte_table", "pmd_null": "no_pte_table"}
"""Trace words of older kernels for results that were renamed."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One difference between the record and the replay.

    Attributes:
        where: for example ``"pass 2: orders"``.
        expected, got: the kernel's value and the machine's; the first part that differs.
    """

    where: str
    expected: str
    got: str


WRITABLE, BEYOND_TABLE = "writable-pte", "beyond-page-table"

APART = {
    WRITABLE: "a kernel before 6.18 needs a PTE that may be written, and the case does not record whether one may",
    BEYOND_TABLE: "the series reads beyond the end of the page table, and the case does not record the entries there",
}
"""Reasons to count cases apart, by name."""


@dataclass(frozen=True, slots=True)
class CaseReport:
    """Result of one case.

    Attributes:
        mismatches: differences of the first pass that has any; empty if the case agrees.
        apart: unrecorded state that decided the case, a name of :data:`APART`. Such a case agrees for one of the states
            that it may have been in, and is not counted as a match.
    """

    JSON: ClassVar = "case=id differences=mismatches"

    id: str
    mismatches: tuple[Mismatch, ...]
    apart: str = ""


@dataclass
class ReplayTotals:
    """The totals of a replay.

    Attributes:
        files: golden files.
        cases: number of cases replayed.
        failed: reports of the cases that do not agree.
        apart: ids of the cases counted apart, by a name of :data:`APART`.
    """

    JSON: ClassVar = "files cases match=matches mismatch=mismatches apart mismatches=failed"

    files: tuple[str, ...] = ()
    cases: int = 0
    failed: list[CaseReport] = field(default_factory=list)
    apart: dict[str, list[str]] = field(default_factory=dict)

    @property
    def matches(self) -> int:
        """Number of cases that agree."""
        return self.cases - len(self.failed) - sum(map(len, self.apart.values()))

    @property
    def mismatches(self) -> int:
        """Number of cases that do not agree."""
        return len(self.failed)

    def add(self, report: CaseReport) -> None:
        """Count a case."""
        self.cases += 1
        if report.mismatches:
            self.failed.append(report)
        elif report.apart:
            self.apart.setdefault(report.apart, []).append(report.id)


def replay(cases: Iterable[dict[str, Any]], policy: str | Policy | None = None) -> ReplayTotals:
    """Replay cases one after another.

    Args:
        policy: see :func:`replay_case`.

    Raises:
        UsageError: a case is invalid (:mod:`mthp.sim.golden.cases`).
    """
    totals = ReplayTotals()
    for case in cases:
        totals.add(replay_case(case, policy))
    return totals


def replay_case(case: dict[str, Any], policy: str | Policy | None = None) -> CaseReport:
    """Build a case's state, run its passes, and compare after each.

    Args:
        policy: used instead of that of the case's release or series.

    Raises:
        UsageError: the case is invalid (:mod:`mthp.sim.golden.cases`), or its series is not known.
    """
    known = case_of(case)
    policy = policy_of(known.release, known.series) if policy is None else policy
    kernel = kernel_of(known.release, known.series)
    if not kernel.wants_writable:
        return _report(known, policy, kernel)
    # Some recordings were made without that rule of kernels before 6.18: a range needs a writable PTE.
    unruled = replace(kernel, wants_writable=False, leaves_empty_runs=False)
    if not (report := _report(known, policy, unruled)).mismatches:
        return report
    ruled = _report(known, policy, kernel)
    # Whether an entry was writable is not always recorded: if only such entries decide the case, it is counted apart.
    in_doubt = _report(known, policy, kernel, doubtful_writable=True)
    if ruled.mismatches and in_doubt.mismatches:
        return ruled
    return ruled if not ruled.mismatches and not in_doubt.mismatches else replace(ruled, mismatches=(), apart=WRITABLE)


def _report(case: Case, policy: str | Policy, kernel: Kernel, *, doubtful_writable: bool = False) -> CaseReport:
    """Return the report of a replay under the given rules."""
    stage = Stage(case, policy, kernel, doubtful_writable=doubtful_writable)
    before = stage.observe()
    for number, recorded in enumerate(case.passes, 1):
        counters = stage.machine.counters.values()
        error = stage.run_pass()
        now = stage.observe()
        found = _seen(stage, before, now, counters) | {"errno": error}
        found["stats"] = _stats(case, found["stats"])
        wanted = _recorded(case, recorded)
        if case.intact:
            wanted["contents"] = "intact"
        beyond = stage.known_entries()
        if beyond is not None:
            wanted, found = _up_to(beyond, wanted, found)
        differing = [what for what, value in wanted.items() if value != found[what]]
        # Later passes would only show what follows from this one.
        if differing:
            mismatches = (
                Mismatch(f"pass {number}: {what}", *difference(what, wanted[what], found[what])) for what in differing
            )
            return CaseReport(case.id, tuple(mismatches))
        if beyond is not None:
            # What comes after depends on entries that were not recorded.
            return CaseReport(case.id, (), BEYOND_TABLE)
        before = now
    return CaseReport(case.id, ())


def _up_to(entry: int, wanted: dict[str, Any], found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the orders in front of `entry`, and the events, recorded and found."""
    events = found["events"]
    early = {"orders": runs_of(expanded(found["orders"])[:entry]), "events": events}
    recorded = wanted.get("events", events)[: len(events)]
    return {"orders": runs_of(expanded(wanted["orders"])[:entry]), "events": recorded}, early


def _stats(case: Case, changed: dict[str, int]) -> dict[str, int]:
    """Return the counters that the case's kernel has, under its names."""
    stats = {name: by for name, by in changed.items() if not _UNRECORDED.search(name)}
    if not case.calls:
        stats.pop(_OF_OTHERS, None)
    if case.release >= MTHP_COLLAPSE:
        return stats
    stats = {name: by for name, by in stats.items() if not _SINCE_MTHP_COLLAPSE.fullmatch(name)}
    if case.release < SWPIN:
        stats = {name: by for name, by in stats.items() if not name.endswith("/swpin")}
    if case.series == ANON_COLLAPSE_ALLOC:
        for order in range(case.geometry.pmd_order):
            size = case.geometry.sysfs_name(order)
            if by := changed.get(f"{size}/collapse_alloc"):
                stats[f"{size}/anon_collapse_alloc"] = by
    return stats


def _recorded(case: Case, recorded: ScanRecord) -> dict[str, Any]:
    """Return the recorded values of a pass that the replay must match."""
    seen = recorded.seen
    wanted: dict[str, Any] = {
        name: seen[name] for name in ("scan", "events", "pmd_mapped", "moved", "errno", "rss_kb") if name in seen
    }
    wanted["orders"] = recorded.orders
    if wanted.get("scan"):
        wanted["scan"] = wanted["scan"] | {"result": _word(wanted["scan"].get("result"))}
    if "scan" not in seen and "scan_result" in seen:
        wanted["scan_result"] = _word(seen["scan_result"])
    if seen.get("stats") is not None:
        stats = seen["stats"].items()
        wanted["stats"] = {name: by for name, by in stats if by and (name != _OF_OTHERS or case.calls)}
    if seen.get("events") is not None:
        # A full record: without slots and flags there were none.
        entries = sum(count for _, count in recorded.orders)
        wanted["swap_offsets"] = seen.get("swap_offsets") or []
        wanted["flags"] = [["".join(sorted(letters)), count] for letters, count in seen.get("flags") or [["", entries]]]
    return wanted


def _word(recorded: Any) -> Any:
    """Return today's word for a result."""
    return _OLD_WORDS.get(recorded, recorded) if isinstance(recorded, str) else recorded


def _seen(stage: Stage, before: Observation, now: Observation, counters: dict[str, int]) -> dict[str, Any]:
    """Return a pass of the machine, in the form of the record."""
    events = stage.machine.trace.take()
    changed = stage.machine.counters.since(counters)
    scan = _scan(events)
    return {
        "orders": runs_of(now.orders),
        "scan": scan,
        "scan_result": scan and scan["result"],
        "events": _rows(events, stage.release),
        "stats": changed,
        "pmd_mapped": now.pmd_mapped,
        "rss_kb": now.rss_kb,
        "moved": runs_of((now.frames != before.frames).astype(int).tolist()),
        "flags": runs_of(now.flags),
        "swap_offsets": now.swap,
        "contents": stage.contents(),
    }


def _scan(events: list[Event]) -> dict[str, Any] | None:
    """Return the scan of the PMD range; None if there was none."""
    for event in events:
        if isinstance(event, ScanPmd):
            return {
                "result": event.result.trace_word,
                "referenced": event.referenced,
                "none_or_zero": event.none_or_zero,
                "unmapped": event.unmapped,
            }
    return None


def _rows(events: list[Event], release: Release) -> Runs:
    """Return the other events, each with its number of repetitions in succession."""
    # The trace has the number of a swap-in's result. Older kernels have one more result before it.
    shift = int(release < NO_PTE_TABLE)
    rows: Runs = []
    for event in events:
        if isinstance(event, Isolate):
            rows.append(["isolate", event.order, event.result.trace_word, event.none_or_zero, event.referenced])
        elif isinstance(event, Collapse):
            rows.append(["collapse", event.order, event.result.trace_word])
        elif isinstance(event, Swapin):
            number = int(event.result) + (shift if event.result > ScanResult.NO_PTE_TABLE else 0)
            rows.append(["swapin", event.order, number, event.swapped_in])
    return [[*row, times] for row, times in runs_of(rows)]
