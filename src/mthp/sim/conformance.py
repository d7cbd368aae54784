"""Golden cases of real kernels, replayed: the state before, the trigger, and a comparison of everything afterwards.

A case (one JSON object of a golden file) is one PMD range of one mapping, and up to three passes of khugepaged, or
calls of MADV_COLLAPSE, with all that the kernel let be seen of them: the order of the folio at every page, the scan's
result and its counts, the trace events in order, the counters, which pages moved, their flags, the swap slots still
in use. Contents are followed by the machine itself. :mod:`mthp.sim.stage` builds the state; from there on the
machine knows nothing of the case.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mthp.errors import UsageError
from mthp.sim.stage import MTHP_COLLAPSE, Observation, Runs, Stage, release_of, runs_of
from mthp.sim.trace import Collapse, Event, Isolate, ScanPmd, Swapin

_UNCOUNTED = re.compile("thp_split_pmd")
"""Counters of the whole machine that no collapse moves: what a record has of them, some other process did."""

_UNCOUNTED_BEFORE = re.compile("thp_split_pmd|hugepages-[0-9]+kB/collapse_.*")
"""The same, and the counters that came with collapse to orders below PMD order."""

_KEYS = ("id", "trigger", "orders_enabled", "max_ptes_none", "max_ptes_swap", "max_ptes_shared", "before", "after")


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


def read_cases(path: str | Path) -> Iterator[dict[str, Any]]:
    """The cases of a golden file: JSON lines, compressed if the name ends in ``.gz``.

    Raises:
        UsageError: it cannot be read, or a line is not a case.
    """
    path = Path(path)
    opened = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opened(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                case = _checked(json.loads(line))
                number += 1
                yield case
    except (OSError, EOFError, ValueError, zlib.error) as error:
        what = getattr(error, "strerror", None) or str(error)
        raise UsageError(
            f"{path} cannot be replayed: line {number + 1}: {what}",
            help="give a file of golden cases: JSON lines, compressed if the name ends in .gz",
        ) from error


def _checked(case: Any) -> dict[str, Any]:
    """The case, if it has what every case has.

    Raises:
        ValueError: it has not.
    """
    if not isinstance(case, dict):
        raise ValueError("not a JSON object")
    if missing := [key for key in _KEYS if key not in case]:
        raise ValueError(f"a case without {', '.join(missing)}")
    return case


def replay(cases: Iterable[dict[str, Any]]) -> Replay:
    """Replay cases one after another.

    Raises:
        UsageError: a case has a state, a geometry or a limit that does not exist.
    """
    totals = Replay()
    for case in cases:
        totals.add(replay_case(case))
    return totals


def replay_case(case: dict[str, Any]) -> CaseReport:
    """Build a case's state, run its passes, and compare after each.

    Raises:
        UsageError: the case has a state, a geometry or a limit that does not exist, or is not put together right.
    """
    return CaseReport(str(case["id"]), _mismatches(case, _staged(case)))


def _staged(case: dict[str, Any]) -> Stage:
    try:
        return Stage(case)
    except UsageError as error:
        raise UsageError(f"case {case['id']}: {error.message}", help=error.help) from error
    except (TypeError, KeyError, ValueError) as error:
        raise UsageError(f"case {case['id']} is not put together right: {error!r}") from error


def _mismatches(case: dict[str, Any], stage: Stage) -> tuple[Mismatch, ...]:
    """The differences of the first pass that has any."""
    orders = case["after"]
    before = stage.observe()
    uncounted = _UNCOUNTED if release_of(case) >= MTHP_COLLAPSE else _UNCOUNTED_BEFORE
    for number, recorded in enumerate(case.get("passes") or [{}], 1):
        orders = case.get(f"after_pass{number}", orders)
        counters = stage.machine.counters.values()
        error = stage.run_pass()
        now = stage.observe()
        found = _seen(stage, before, now, counters) | {"errno": error}
        found["stats"] = {name: by for name, by in found["stats"].items() if not uncounted.fullmatch(name)}
        wanted = _recorded(recorded) | {"orders": orders, "contents": "intact"}
        differing = [what for what, value in wanted.items() if value != found[what]]
        if differing:
            return tuple(
                Mismatch(f"pass {number}: {what}", *_difference(wanted[what], found[what])) for what in differing
            )
        before = now
    return ()


def _recorded(recorded: dict[str, Any]) -> dict[str, Any]:
    """What a pass is to be compared with."""
    if not recorded:
        return {}
    wanted: dict[str, Any] = {
        name: recorded[name] for name in ("scan", "events", "pmd_mapped", "moved", "errno") if name in recorded
    }
    wanted["stats"] = {name: by for name, by in recorded["stats"].items() if by and not _UNCOUNTED.fullmatch(name)}
    wanted["swap_offsets"] = recorded.get("swap_offsets", [])
    if "flags" in recorded:
        wanted["flags"] = [["".join(sorted(letters)), count] for letters, count in recorded["flags"]]
    return wanted


def _seen(stage: Stage, before: Observation, now: Observation, counters: dict[str, int]) -> dict[str, Any]:
    """A pass of the machine, in the form of the record."""
    events = stage.machine.trace.take()
    changed = stage.machine.counters.since(counters)
    return {
        "orders": runs_of(now.orders),
        "scan": _scan(events),
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
