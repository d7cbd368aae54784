"""Golden cases of real kernels, replayed: the state before, the trigger, and a comparison of everything afterwards.

A case (one JSON object of a golden file) is one PMD range of one mapping, and up to three passes of khugepaged, or
calls of MADV_COLLAPSE, with all that the kernel let be seen of them: the order of the folio at every page, the scan's
result and its counts, the trace events in order, the counters, which pages moved, their flags, the swap slots still
in use. Contents are followed by the machine itself. :mod:`mthp.sim.stage` builds the state; from there on the
machine knows nothing of the case.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from mthp.sim.golden import MTHP_COLLAPSE, Case, Pass, Runs, case_of, runs_of
from mthp.sim.stage import Observation, Stage
from mthp.sim.trace import Collapse, Event, Isolate, ScanPmd, Swapin

_UNCOUNTED = re.compile("thp_split_pmd")
"""Counters of the whole machine that no collapse moves: what a record has of them, some other process did."""

_UNCOUNTED_BEFORE = re.compile("thp_split_pmd|hugepages-[0-9]+kB/collapse_.*")
"""The same, and the counters that came with collapse to orders below PMD order."""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """One difference between the record and the replay.

    Attributes:
        where: such as ``"pass 2: orders"``.
        expected, got: what the kernel did, and what the machine did; the first part that differs.
    """

    where: str
    expected: str
    got: str


@dataclass(frozen=True, slots=True)
class CaseReport:
    """What came of one case: no mismatch if it agrees, else those of the first pass that does not."""

    id: str
    mismatches: tuple[Mismatch, ...]


@dataclass
class Replay:
    """The totals of a replay.

    Attributes:
        cases: cases replayed.
        failed: the reports of those that do not agree.
    """

    cases: int = 0
    failed: list[CaseReport] = field(default_factory=list)

    @property
    def matches(self) -> int:
        """Cases that agree."""
        return self.cases - len(self.failed)

    def add(self, report: CaseReport) -> None:
        """Count a case."""
        self.cases += 1
        if report.mismatches:
            self.failed.append(report)


def replay(cases: Iterable[dict[str, Any]]) -> Replay:
    """Replay cases one after another.

    Raises:
        UsageError: a case cannot be (:mod:`mthp.sim.golden`).
    """
    totals = Replay()
    for case in cases:
        totals.add(replay_case(case))
    return totals


def replay_case(case: dict[str, Any]) -> CaseReport:
    """Build a case's state, run its passes, and compare after each.

    Args:
        case: the JSON object.

    Raises:
        UsageError: the case cannot be (:mod:`mthp.sim.golden`).
    """
    known = case_of(case)
    return CaseReport(known.id, _mismatches(known))


def _mismatches(case: Case) -> tuple[Mismatch, ...]:
    """The differences of the first pass that has any."""
    stage = Stage(case)
    before = stage.observe()
    uncounted = _UNCOUNTED if case.release >= MTHP_COLLAPSE else _UNCOUNTED_BEFORE
    for number, recorded in enumerate(case.passes, 1):
        counters = stage.machine.counters.values()
        error = stage.run_pass()
        now = stage.observe()
        found = _seen(stage, before, now, counters) | {"errno": error}
        found["stats"] = {name: by for name, by in found["stats"].items() if not uncounted.fullmatch(name)}
        wanted = _recorded(recorded)
        if case.intact:
            wanted["contents"] = "intact"
        differing = [what for what, value in wanted.items() if value != found[what]]
        if differing:
            return tuple(
                Mismatch(f"pass {number}: {what}", *_difference(wanted[what], found[what])) for what in differing
            )
        before = now
    return ()


def _recorded(recorded: Pass) -> dict[str, Any]:
    """What a pass is to be compared with: what the record has of it."""
    seen = recorded.seen
    wanted: dict[str, Any] = {
        name: seen[name] for name in ("scan", "events", "pmd_mapped", "moved", "errno") if name in seen
    }
    wanted["orders"] = recorded.orders
    if "scan" not in seen and "scan_result" in seen:
        wanted["scan_result"] = seen["scan_result"]
    if seen.get("stats") is not None:
        wanted["stats"] = {name: by for name, by in seen["stats"].items() if by and not _UNCOUNTED.fullmatch(name)}
    if seen.get("events") is not None:
        # A full record, in which nothing said of slots and flags says that there are none.
        entries = sum(count for _, count in recorded.orders)
        wanted["swap_offsets"] = seen.get("swap_offsets") or []
        wanted["flags"] = [["".join(sorted(letters)), count] for letters, count in seen.get("flags") or [["", entries]]]
    return wanted


def _seen(stage: Stage, before: Observation, now: Observation, counters: dict[str, int]) -> dict[str, Any]:
    """A pass of the machine, in the form of the record."""
    events = stage.machine.trace.take()
    changed = stage.machine.counters.since(counters)
    scan = _scan(events)
    return {
        "orders": runs_of(now.orders),
        "scan": scan,
        "scan_result": scan and scan["result"],
        "events": _rows(events),
        "stats": changed,
        "pmd_mapped": now.pmd_mapped,
        "moved": runs_of((now.frames != before.frames).astype(int).tolist()),
        "flags": runs_of(now.flags),
        "swap_offsets": now.swap,
        "contents": stage.contents(),
    }


def _scan(events: list[Event]) -> dict[str, Any] | None:
    """The scan of the PMD range; None if there was none."""
    for event in events:
        if isinstance(event, ScanPmd):
            return {
                "result": event.result.trace_word,
                "referenced": event.referenced,
                "none_or_zero": event.none_or_zero,
                "unmapped": event.unmapped,
            }
    return None


def _rows(events: list[Event]) -> Runs:
    """The other events, each with how often it came in succession."""
    rows: Runs = []
    for event in events:
        if isinstance(event, Isolate):
            rows.append(["isolate", event.order, event.result.trace_word, event.none_or_zero, event.referenced])
        elif isinstance(event, Collapse):
            rows.append(["collapse", event.order, event.result.trace_word])
        elif isinstance(event, Swapin):
            rows.append(["swapin", event.order, int(event.result), event.swapped_in])
    return [[*row, times] for row, times in runs_of(rows)]


def _difference(wanted: Any, found: Any) -> tuple[str, str]:
    """The first part in which two values differ, of each."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        names = [name for name in sorted({*wanted, *found}) if wanted.get(name, 0) != found.get(name, 0)]
        return _items(wanted, names), _items(found, names)
    if isinstance(wanted, list) and isinstance(found, list):
        pairs = enumerate(zip(wanted, found, strict=False))
        at = next((i for i, (one, other) in pairs if one != other), min(len(wanted), len(found)))
        return _part(wanted, at), _part(found, at)
    return str(wanted), str(found)


def _items(values: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name} {values.get(name, 0)}" for name in names)


def _part(values: list[Any], at: int) -> str:
    return f"from item {at}: {values[at : at + 3]}" if at < len(values) else f"only {len(values)} items"
