"""Differences between a recorded and a replayed pass, in words.

Both sides show the same entries, events or counters, so that two lines one above the other can be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby, zip_longest
from typing import Any

from mthp.sim.golden.cases import Runs, expanded

SHOWN = 3
"""Runs of entries, or events, shown of each difference: enough to see the first error."""

_LETTERS = {
    "c": "in the swap cache",
    "l": "lazyfree",
    "m": "mlocked",
    "r": "referenced",
    "s": "shared",
    "w": "write-protected",
}
"""Meanings of the letters of a page's flags (tests/golden/README.md)."""


def difference(what: str, wanted: Any, found: Any) -> tuple[str, str]:
    """Return the recorded value and the found value, as far as they differ.

    Args:
        what: ``orders``, ``moved``, ``flags``, ``events``, ``swap_offsets``, ``stats``, ``scan`` or another name.
    """
    if what in _ENTRIES and isinstance(wanted, list) and isinstance(found, list):
        return _entries(what, expanded(wanted), expanded(found))
    if what == "events" and isinstance(wanted, list) and isinstance(found, list):
        return _events(wanted, found)
    if what == "swap_offsets" and isinstance(wanted, list) and isinstance(found, list):
        return _slots([run for run in wanted if run not in found]), _slots([run for run in found if run not in wanted])
    if isinstance(wanted, dict) and isinstance(found, dict):
        # A counter that is missing did not change.
        names = [name for name in sorted({*wanted, *found}) if wanted.get(name, 0) != found.get(name, 0)]
        return _named(wanted, names), _named(found, names)
    return str(wanted), str(found)


def _order(value: int | str) -> str:
    return value if isinstance(value, str) else f"order {value}" if value else "base pages"


def _moved(value: int) -> str:
    return "moved" if value else "not moved"


def _flags(value: str) -> str:
    return ", ".join(_LETTERS.get(letter, letter) for letter in value) or "no flags"


_ENTRIES: dict[str, Callable[[Any], str]] = {"orders": _order, "moved": _moved, "flags": _flags}
"""Values with one item per entry, and how an item is written."""


def _entries(what: str, wanted: list[Any], found: list[Any]) -> tuple[str, str]:
    """Return the runs of entries in which both sides are constant, and differ."""
    runs = []
    start = 0
    for (one, other), group in groupby(zip_longest(wanted, found, fillvalue="no entry")):
        end = start + len(list(group))
        # Only runs in which both sides are constant: each can be written as one value.
        if one != other:
            runs.append((f"PTE {start}" if end == start + 1 else f"PTEs {start}-{end - 1}", one, other))
        start = end
    more = f"; and {len(runs) - SHOWN} more" if len(runs) > SHOWN else ""
    write = _ENTRIES[what]
    sides = [[f"{place}: {write(values[side])}" for place, *values in runs[:SHOWN]] for side in (0, 1)]
    return "; ".join(sides[0]) + more, "; ".join(sides[1]) + more


def _events(wanted: Runs, found: Runs) -> tuple[str, str]:
    """Return the events from the first difference on."""
    pairs = enumerate(zip_longest(wanted, found))
    at = next((number for number, (one, other) in pairs if one != other), 0)

    def side(events: Runs) -> str:
        if at >= len(events):
            return f"no more events behind the first {at}" if at else "no events"
        return f"from event {at + 1} on: " + "; ".join(_event(event) for event in events[at : at + SHOWN])

    return side(wanted), side(found)


def _event(event: list[Any]) -> str:
    """Return one event with its repetitions: ``isolate order 4: succeeded, 3 none, 13 referenced, 2 times``."""
    name, order, *rest, times = event
    if name == "isolate":
        result, none, referenced = rest
        rest = [result, f"{none} none", f"{referenced} referenced"]
    elif name == "swapin":
        result, swapped_in = rest
        rest = ["succeeded" if result == 1 else f"result {result}", f"{swapped_in} read back"]
    often = [f"{times} times"] if times != 1 else []
    return f"{name} order {order}: " + ", ".join(map(str, [*rest, *often]))


def _slots(runs: Runs) -> str:
    if not runs:
        return "no other swap entries"
    shown = [f"{count} from PTE {first} on in slots from {slot} on" for first, slot, count in runs[:SHOWN]]
    return "; ".join(shown) + (f"; and {len(runs) - SHOWN} more" if len(runs) > SHOWN else "")


def _named(values: dict[str, Any], names: list[str]) -> str:
    return ", ".join(f"{name} {values.get(name, 0)}" for name in names)
