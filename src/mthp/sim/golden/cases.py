"""Golden cases: recordings of a real kernel, one JSON object a line, read and checked.

A case is one PMD range of one mapping, before and after up to three passes. :data:`REQUIRED` lists its required fields;
the others are optional, and unknown fields are skipped. An invalid field is refused with the name of the case and of
the field, so that later modules need no checks.
"""

from __future__ import annotations

import gzip
import io
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mthp.bounded import Bound, parse_json, read_small
from mthp.errors import UsageError
from mthp.geometry import X86_64, Geometry, geometry_named
from mthp.sim.golden.passcalls import CALLS, Call, call_of
from mthp.tunables import LIMITS, Tunables

REQUIRED = ("id", "trigger", "orders_enabled", *LIMITS, "before", "after")

TRIGGERS = ("khugepaged", "madvise", "split", "trim")
"""``split`` and ``trim`` make the calls in the case's list (:mod:`mthp.sim.golden.passcalls`)."""

NEWEST = "7.3"
"""Kernel of a case without the field ``kernel``."""

NO_PAGE = frozenset({"none", "zero", "guard", "uffd_zero", "uffd_marker"})
SWAPPED = frozenset({"swap", "swap_shared", "uffd_swap"})
LARGE = frozenset({"large", "large_shared"})
SMALL = frozenset(
    {"anon", "shared", "swapcache", "swapped_back", "cold", "lazyfree", "lazyfree_dirty", "mlocked", "pinned", "uffdwp"}
)
KINDS = NO_PAGE | SWAPPED | SMALL | LARGE
"""The kinds of page table entries; a kind of :data:`LARGE` has the folio's order behind a colon."""

_LETTERS = {"cold": "", "lazyfree": "lr", "lazyfree_dirty": "lr", "mlocked": "mr"}
"""Default letters by kind, for cases without letters; ``r`` for other kinds, because MGLRU marks faulted pages."""

VMA_WORDS = ("uffd_wp_registered", "uffd_missing_registered", "mlocked", "droppable")

MAX_SLOT = 1 << 22
"""Largest swap slot of a case; the simulated device has all slots up to the largest used."""

FILE_BYTES = Bound(1 << 28, "bytes of golden cases")
"""Also after decompression; the largest recorded file has 20 MiB."""

LINES = Bound(1 << 17, "lines of golden cases")
"""The largest recorded file has 3 924."""

CASE_BYTES = Bound(1 << 20, "bytes of one golden case")
"""The largest recorded case has 124 KiB."""

PASSES = Bound(16, "passes of one golden case")
"""Each pass is simulated; recordings have three."""

Runs = list[list[Any]]


def runs_of(values: Iterable[Any]) -> Runs:
    """Return the run lengths of values: [value, count] of equal neighbours."""
    return [[value, len(list(group))] for value, group in groupby(values)]


def expanded(runs: Runs) -> list[Any]:
    """Return the values of run lengths."""
    return [value for value, count in runs for _ in range(count)]


def _mask(runs: Runs, test: Callable[[Any], bool]) -> NDArray[np.bool_]:
    """Return which values of run lengths pass a test, which is made once a run: bool, shape (values,)."""
    return np.repeat([test(value) for value, _ in runs], [count for _, count in runs])


@dataclass(frozen=True)
class ScanRecord:
    """The record of a full scan, or of a call of MADV_COLLAPSE.

    Attributes:
        orders: run lengths of the orders that pagemap and kpageflags showed afterwards.
        seen: all other recorded values, by name.
    """

    orders: Runs
    seen: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A golden case.

    Attributes:
        release: major and minor number of the kernel.
        series: series that the kernel was built with, if any; its rules then apply (:mod:`mthp.sim.kernel`).
        setup: way in which its pages were made: a word of :data:`SETUPS`; ``""`` if the case has none.
        forced: whether MADV_COLLAPSE was called; otherwise khugepaged scanned.
        orders: enabled orders.
        tunables: tunables, with the case's limits.
        vma: words of the mapping.
        kinds: run lengths of the kinds of the entries.
        folio_orders: int64, shape (ptes_per_pmd,): order of the large folio that the entry is a part of.
        letters: run lengths of the letters recorded for the pages.
        slots: int64, same shape: swap slot of each entry that has one, else 0.
        intact: whether the contents were found unchanged.
        calls: calls of the passes; empty if each is a scan, or MADV_COLLAPSE.
    """

    id: str
    release: tuple[int, int]
    series: str | None
    setup: str
    geometry: Geometry
    forced: bool
    orders: tuple[int, ...]
    tunables: Tunables
    vma: tuple[str, ...]
    kinds: Runs
    folio_orders: NDArray[np.int64]
    letters: Runs
    slots: NDArray[np.int64]
    intact: bool
    passes: tuple[ScanRecord, ...]
    calls: tuple[Call, ...] = ()

    def are(self, kinds: Collection[str]) -> NDArray[np.bool_]:
        """Return which entries are of one of these kinds: bool, shape (ptes_per_pmd,)."""
        return _mask(self.kinds, lambda kind: kind in kinds)

    def seen(self, letter: str) -> NDArray[np.bool_]:
        """Return which entries were recorded with a letter: bool, shape (ptes_per_pmd,)."""
        return _mask(self.letters, lambda letters: letter in letters)


EVENT_WORDS = {"isolate": 6, "collapse": 4, "swapin": 5}
"""Number of words of each event of a pass (tests/golden/README.md)."""


def read_cases(path: str | Path) -> Iterator[dict[str, Any]]:
    """Return the JSON objects of a golden file; raises as :func:`case_lines`."""
    return map(parse_case, case_lines(path))


def case_lines(path: str | Path) -> list[bytes]:
    """Return the lines of a golden file that hold a case. It is compressed if its name ends in ``.gz``.

    Raises:
        UsageError: the file cannot be read or is too large, or a required field is missing.
    """
    path = Path(path)
    data = io.BytesIO(read_small(path, FILE_BYTES))
    lines: list[bytes] = []
    number = total = 0
    try:
        with gzip.GzipFile(fileobj=data) if path.suffix == ".gz" else data as file:
            # One byte more than is allowed, so that a longer line is noticed without being read.
            while line := file.readline(CASE_BYTES.now + 1):
                number += 1
                LINES.check(number)
                total += len(line)
                CASE_BYTES.check(len(line))
                FILE_BYTES.check(total)
                if line.strip():
                    parse_case(line)
                    lines.append(line)
    except (OSError, EOFError, ValueError, zlib.error) as error:
        what, hint = getattr(error, "strerror", None) or str(error), getattr(error, "help", "")
        # Either the last line read is wrong, or the next could not be read.
        number += not isinstance(error, UsageError)
        raise UsageError(f"{path} cannot be replayed: line {number}: {what}", help=hint or _HOW) from error
    return lines


_HOW = "use a file of golden cases: JSON lines, compressed if the name ends in .gz"


def parse_case(line: bytes) -> dict[str, Any]:
    """Return the JSON object of a line, checked for the required fields.

    Raises:
        UsageError: the line is not such an object.
    """
    return _with_all_keys(parse_json(line, size=CASE_BYTES))


def _with_all_keys(case: Any) -> dict[str, Any]:
    """Return the case if it has the required fields.

    Raises:
        UsageError: a field is missing.
    """
    if not isinstance(case, dict):
        raise UsageError("not a JSON object")
    if missing := [key for key in REQUIRED if key not in case]:
        raise UsageError(f"a case without {', '.join(missing)}")
    return case


def case_of(raw: dict[str, Any]) -> Case:
    """Return a case, checked.

    Raises:
        UsageError: a field is invalid; the message names the case and the field.
    """
    try:
        return _case(raw)
    except UsageError as error:
        raise UsageError(f"case {str(raw.get('id'))[:60]}: {error.message}", help=error.help) from error


def _case(raw: dict[str, Any]) -> Case:
    geometry = geometry_named(str(raw["geometry"])) if raw.get("geometry") is not None else X86_64
    n = geometry.ptes_per_pmd
    states = [
        (*_kind(_word(raw, "before", state), geometry.pmd_order), count)
        for state, count in _sized_runs(raw, "before", n)
    ]
    kinds = [[kind, count] for kind, _, count in states]
    vma = _words(raw, "vma", VMA_WORDS)
    if raw.get("before_flags") is not None:
        letters = [[_word(raw, "before_flags", value), count] for value, count in _sized_runs(raw, "before_flags", n)]
    else:
        letters = [[_LETTERS.get(kind, "r") + ("l" if "droppable" in vma else ""), count] for kind, count in kinds]
    trigger = raw["trigger"]
    if trigger not in TRIGGERS:
        raise _wrong("trigger", trigger, f"use {' or '.join(TRIGGERS)}")
    return Case(
        id=str(raw["id"]),
        release=_release(raw.get("kernel", NEWEST)),
        series=None if raw.get("series") is None else _word(raw, "series", raw["series"]),
        setup=raw["setup"] if isinstance(raw.get("setup"), str) else "",
        geometry=geometry,
        forced=trigger == "madvise",
        orders=tuple(
            geometry.check_order(_number(raw, "orders_enabled", order)) for order in _list(raw, "orders_enabled")
        ),
        tunables=Tunables.defaults(geometry).replaced(
            geometry, **{name: _number(raw, name, raw[name]) for name in LIMITS}
        ),
        vma=vma,
        kinds=kinds,
        folio_orders=np.repeat([order for _, order, _ in states], [count for *_, count in states]),
        letters=letters,
        slots=_slots(raw, _mask(kinds, lambda kind: kind in SWAPPED or kind == "swapcache")),
        intact=raw.get("data_intact") is not False,
        passes=(passes := _passes(raw, n)),
        calls=_calls(raw, n, len(passes)) if trigger in ("split", "trim") else (),
    )


def _wrong(key: str, value: Any, help: str = "") -> UsageError:
    text = repr(value)
    return UsageError(f"{key}: {text if len(text) < 60 else text[:57] + '...'} cannot be", help=help)


def _list(raw: dict[str, Any], key: str) -> list[Any]:
    """Return an optional list."""
    value = raw.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise _wrong(key, value, "it is a list")
    return value


def _number(raw: dict[str, Any], key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(key, value, "it is a whole number")
    return value


def _word(raw: dict[str, Any], key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(key, value, "it is a word")
    return value


def _words(raw: dict[str, Any], key: str, known: tuple[str, ...]) -> tuple[str, ...]:
    words = tuple(_list(raw, key))
    if unknown := [word for word in words if word not in known]:
        raise _wrong(key, unknown[0], f"use {', '.join(known)}")
    return words


def _release(kernel: Any) -> tuple[int, int]:
    """Return major and minor number of a kernel's release."""
    numbers = str(kernel).split(".")[:2]
    if len(numbers) != 2 or not all(re.fullmatch("[0-9]{1,4}", number) for number in numbers):
        raise _wrong("kernel", kernel, "use two or three numbers: 7.3.4")
    return int(numbers[0]), int(numbers[1])


def _sized_runs(raw: dict[str, Any], key: str, size: int) -> Runs:
    """Return run lengths as written, [value, count] each, that cover a PMD range of `size` entries."""
    runs, entries = _list(raw, key), 0
    for run in runs:
        if not isinstance(run, list) or len(run) != 2 or not isinstance(run[1], int) or run[1] < 1:
            raise _wrong(key, run, "it is a list of [value, count]")
        entries += run[1]
    # Before anything is expanded: a run may be as long as a number can be written.
    if entries != size:
        raise UsageError(f"{key} has {entries} entries, a PMD range has {size}")
    return runs


def _kind(state: str, pmd_order: int) -> tuple[str, int]:
    """Return the kind in a state such as ``large:4``, and the order, which is 0 except for large folios."""
    kind, _, order = state.partition(":")
    if kind not in KINDS:
        raise UsageError(f"unknown state {state!r}", help=f"use {', '.join(sorted(KINDS))}")
    of_order = int(order) if order.isascii() and order.isdecimal() and len(order) < 3 else 0
    # An order where none belongs, or none where one does.
    if (kind in LARGE) != (0 < of_order <= pmd_order) or (order and kind not in LARGE):
        raise UsageError(f"state {state!r} does not exist where the PMD order is {pmd_order}")
    return kind, of_order


def _calls(raw: dict[str, Any], n: int, passes: int) -> tuple[Call, ...]:
    """Return the call of each pass."""
    calls = []
    for words in _list(raw, "calls"):
        if (call := call_of(words, n)) is None:
            raise _wrong("calls", words, f"it is a list of a word and its numbers: {', '.join(CALLS)}")
        calls.append(call)
    if len(calls) != passes:
        raise UsageError(f"calls: {len(calls)} for {passes} passes")
    return tuple(calls)


def _slots(raw: dict[str, Any], needed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return the swap slot of each entry: recorded, or, if it needs one, behind the recorded ones; else 0.

    Args:
        needed: bool, shape (ptes_per_pmd,): which entries need one.
    """
    slots = np.zeros(len(needed), np.int64)
    for run in _list(raw, "swap_offsets"):
        if not isinstance(run, list) or len(run) != 3:
            raise _wrong("swap_offsets", run, "it is a list of [first entry, slot, count]")
        first, slot, count = (_number(raw, "swap_offsets", value) for value in run)
        if not (0 <= first < first + count <= len(needed) and 0 < slot <= MAX_SLOT):
            raise _wrong("swap_offsets", run)
        slots[first : first + count] = np.arange(slot, slot + count)
    slots[~needed] = 0
    missing = needed & (slots == 0)
    # With a gap, so that no folio's slots adjoin those that were recorded.
    slots[missing] = slots.max() + 2 + np.arange(np.count_nonzero(missing))
    if len(np.unique(slots[needed])) < np.count_nonzero(needed):
        raise UsageError("swap_offsets: two entries have one slot")
    return slots


def _passes(raw: dict[str, Any], n: int) -> tuple[ScanRecord, ...]:
    """Return the record of each pass; unchanged orders are not repeated in the file."""
    recorded = _list(raw, "passes")
    PASSES.check(len(recorded))
    if not recorded:
        # The values of the first pass are also at the top of the case, and sometimes only there.
        recorded = [{key: raw[key] for key in ("scan_result", "stats") if key in raw}]
    # The state after a pass is recorded only where it differs from the one before.
    orders, passes = _sized_runs(raw, "after", n), []
    for number, seen in enumerate(recorded, 1):
        if not isinstance(seen, dict):
            raise _wrong(f"passes[{number - 1}]", seen, "it is an object")
        if raw.get(f"after_pass{number}") is not None:
            orders = _sized_runs(raw, f"after_pass{number}", n)
        if (stats := seen.get("stats")) is not None and (
            not isinstance(stats, dict) or not all(isinstance(by, int) for by in stats.values())
        ):
            raise _wrong("stats", stats, "it is an object of numbers")
        # One value for each entry, or none at all.
        for name, check in (("flags", _word), ("moved", _number)):
            for value, _ in _sized_runs(seen, name, n) if seen.get(name) is not None else ():
                check(seen, name, value)
        if not isinstance(seen.get("scan") or {}, dict):
            raise _wrong("scan", seen["scan"], "it is an object")
        _check_events(_list(seen, "events"))
        for run in _list(seen, "swap_offsets"):
            if not isinstance(run, list) or len(run) != 3 or not all(isinstance(number, int) for number in run):
                raise _wrong("swap_offsets", run, "it is a list of [first entry, slot, count]")
        passes.append(ScanRecord(orders, seen))
    return tuple(passes)


def _check_events(events: list[Any]) -> None:
    """Check that each event is a list of a name, an order, its values and the repetitions."""
    for event in events:
        length = EVENT_WORDS.get(event[0]) if isinstance(event, list) and event and isinstance(event[0], str) else None
        if length is None or len(event) != length or not isinstance(event[1], int) or not isinstance(event[-1], int):
            raise _wrong("events", event, f"it is a list of [name, order, ..., times]: {', '.join(EVENT_WORDS)}")
