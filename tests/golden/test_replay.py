"""Every recorded case replays in the simulated machine: orders, scan, events, counters, flags, slots, contents."""

from __future__ import annotations

import copy
import gzip
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from golden.loader import HERE, SERIES, STATES_FILE, series_file
from mthp.sim.golden.cases import parse_case
from mthp.sim.golden.conformance import BEYOND_TABLE, WRITABLE, replay_case

FILES = sorted(HERE.glob("*.jsonl.gz"))

APART = {
    series_file("jain-rfc-2024-12", "states"): {BEYOND_TABLE: 5, WRITABLE: 2},
    series_file("jain-rfc-2024-12", "states-nowr"): {BEYOND_TABLE: 3},
    series_file("pache-rfc1-reconstructed", "states"): {WRITABLE: 6},
    series_file("pache-rfc2", "states"): {WRITABLE: 1},
}
"""Files with cases that depend on unrecorded facts."""


BYTES_A_TEST = 1 << 17
"""Compressed bytes of a file for each test of its cases, so that several processes share the largest file.

A part has every n-th case, and so some of each category. `make test` replays the first part only.
"""

SLOW = {series_file(series, states) for series in SERIES for states in ("states-nowr", "anon")} - {
    series_file("jain-rfc-2024-12", "anon")
}
"""Files that `make test` leaves out: of each series, the states with writable entries remain, and memory of one."""

PARTS = [
    pytest.param(
        path,
        part,
        parts,
        id=path.name.partition(".jsonl")[0] + (f"-{part}" if parts > 1 else ""),
        marks=[pytest.mark.slow] if part or path.name in SLOW else [],
    )
    for path in FILES
    for parts in [-(-path.stat().st_size // BYTES_A_TEST)]
    for part in range(parts)
]


def cases_of(path: Path, first: int = 0, step: int = 1) -> Iterator[dict[str, Any]]:
    """Read every `step`-th case of a file, from number `first` on."""
    with gzip.open(path) as lines:
        yield from map(parse_case, islice(lines, first, None, step))


@pytest.mark.parametrize(("path", "part", "parts"), PARTS)
def test_every_case_agrees(path: Path, part: int, parts: int) -> None:
    reports = list(map(replay_case, cases_of(path, part, parts)))
    assert reports
    assert [report for report in reports if report.mismatches] == []
    assert Counter(report.apart for report in reports if report.apart) == APART.get(path.name, {})


@pytest.mark.parametrize("series", SERIES)
def test_no_other_policy_explains_a_series(series: str) -> None:
    """A few cases do: each series has a rule of its own in them that no other policy has."""
    cases = list(islice(cases_of(HERE / series_file(series, "anon")), 15))
    for policy in set(SERIES.values()) | {"mainline", "pmd-only"}:
        reports = [replay_case(case, policy) for case in cases]
        assert any(report.mismatches for report in reports) == (policy != SERIES[series])


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    """A case with several attempts, swap and a second pass."""
    for case in cases_of(HERE / STATES_FILE):
        first = case["passes"][0]
        if case["trigger"] == "khugepaged" and len(first["events"]) > 6 and first.get("swap_offsets"):
            return case
    pytest.fail("no such case is recorded")


@pytest.mark.parametrize(
    ("what", "path", "value"),
    [
        ("orders", ("after",), [[3, 512]]),
        ("scan", ("passes", 0, "scan", "referenced"), 1),
        ("events", ("passes", 0, "events", 0), ["collapse", 2, "failed", 1]),
        ("stats", ("passes", 0, "stats", "full_scans"), 7),
        ("moved", ("passes", 0, "moved"), [[1, 512]]),
        ("swap_offsets", ("passes", 0, "swap_offsets"), []),
        ("pmd_mapped", ("passes", 0, "pmd_mapped"), True),
        ("flags", ("passes", 0, "flags"), [["s", 512]]),
    ],
)
def test_a_record_that_says_otherwise_is_told(
    case: dict[str, Any], what: str, path: tuple[str | int, ...], value: object
) -> None:
    changed = copy.deepcopy(case)
    place: Any = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    report = replay_case(changed)
    assert f"pass 1: {what}" in [mismatch.where for mismatch in report.mismatches]
    assert all(mismatch.expected != mismatch.got for mismatch in report.mismatches)
