"""Read the recorded cases of real kernels: gzip, one JSON object a line, with the keys of ``README.md`` here."""

from __future__ import annotations

import functools
import gzip
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mthp.eligibility import Trigger
from mthp.geometry import X86_64, Geometry, geometry_named

HERE = Path(__file__).parent

ANON_FILES = (
    "linux-7.3.4-anon.jsonl.gz",
    "linux-7.3.4-arm64-16k-anon.jsonl.gz",
    "linux-7.2.13-ppc64-64k-anon.jsonl.gz",
)
STATES_FILE = "linux-7.3.4-states.jsonl.gz"
SERIES = {"jain-rfc-2024-12": "per-order", "pache-rfc1-reconstructed": "rfc", "pache-rfc2": "rfc2"}
"""The series that kernels were built with, and the policy of each."""


def series_file(series: str, kind: str) -> str:
    """Return the file of one series: `kind` is ``anon``, ``states`` or ``states-nowr``."""
    return f"linux-6.12.117-{series}-{kind}.jsonl.gz"


NOT_MAPPED = -1
"""In :attr:`Case.after`: none, a swap entry, or a marker."""

_SWAP = {"swap", "swap_shared", "guard", "uffd_swap", "uffd_marker"}
_UFFD = {"uffdwp", "uffd_zero", "uffd_swap", "uffd_marker"}
_ZERO = {"zero", "uffd_zero"}

Runs = Sequence[Sequence[Any]]


@dataclass(frozen=True)
class Case:
    """One PMD range that a kernel worked on.

    Attributes:
        id: of the case, unique in its file.
        raw: the JSON object.
    """

    id: str
    raw: dict[str, Any]

    @property
    def geometry(self) -> Geometry:
        """Of the machine that it was recorded on."""
        return geometry_named(self.raw["geometry"]) if "geometry" in self.raw else X86_64

    @property
    def category(self) -> str:
        """Which kind of state the case is about; ``"anon"`` where the file has but one kind."""
        return str(self.raw.get("category", "anon"))

    @property
    def trigger(self) -> Trigger:
        """Return the trigger of the collapse."""
        return "madvise" if self.raw["trigger"] == "madvise" else "khugepaged"

    @property
    def orders(self) -> frozenset[int]:
        """Return the enabled orders."""
        return frozenset(self.raw["orders_enabled"])

    @property
    def limits(self) -> dict[str, int]:
        """max_ptes_none, max_ptes_swap and max_ptes_shared."""
        return {name: int(self.raw[name]) for name in ("max_ptes_none", "max_ptes_swap", "max_ptes_shared")}

    @property
    def uffd_armed(self) -> bool:
        """Return whether the VMA was registered with userfaultfd."""
        return any(flag.startswith("uffd_") for flag in self.raw.get("vma", ()))

    @property
    def droppable(self) -> bool:
        """Return whether the VMA was VM_DROPPABLE."""
        return "droppable" in self.raw.get("vma", ())

    @property
    def before(self) -> list[str]:
        """Return the state of each PTE."""
        return list(_expanded(self.raw["before"]))

    @property
    def after(self) -> list[int]:
        """Return the order of the folio at each PTE after the first pass; 0 for the zero page, else ``NOT_MAPPED``."""
        words = (0 if word == "zero" else word for word in _expanded(self.raw["after"]))
        return [word if isinstance(word, int) else NOT_MAPPED for word in words]

    @property
    def scan_result(self) -> str:
        """Return the trace event's word for the first pass; ``""`` if no scan took place."""
        return str(self.raw["scan_result"] or "")

    @property
    def scanned(self) -> bool:
        """Return whether the first pass scanned the range at all."""
        return self.raw["scan_result"] is not None

    @property
    def attempts(self) -> list[tuple[int, str]]:
        """Return the first pass's calls of collapse_huge_page, in order: order, and the trace event's word."""
        found = []
        for name, order, *rest in self.raw["passes"][0]["events"]:
            if name == "collapse":
                result, times = rest
                found += [(order, result)] * times
        return found

    @property
    def tried_whole_range(self) -> bool:
        """Return whether the first attempt of the first pass was at the PMD order."""
        return bool(self.attempts) and self.attempts[0][0] == self.geometry.pmd_order

    def planes(self) -> dict[str, NDArray[Any]]:
        """Return the planes of ``mthp.plan_ranges`` for `before`: bool, and int8 for folio_order, each (1, N)."""
        states = self.raw["before"]
        flags = self.raw.get("before_flags", [["r", self.geometry.ptes_per_pmd]])

        def plane(runs: Runs, chosen: Callable[[str], object]) -> NDArray[np.bool_]:
            return np.repeat([bool(chosen(value)) for value, _ in runs], [count for _, count in runs])[None]

        orders = np.repeat([int(state.partition(":")[2] or 0) for state, _ in states], [count for _, count in states])
        return {
            "present": plane(states, lambda state: state not in _SWAP and state != "none"),
            "zero": plane(states, lambda state: state in _ZERO),
            "swap": plane(states, lambda state: state in _SWAP),
            "guard": plane(states, lambda state: state == "guard"),
            "uffd": plane(states, lambda state: state in _UFFD),
            "shared": _shared(plane(flags, lambda letters: "s" in letters)[0], orders)[None],
            "lazyfree": plane(states, lambda state: state == "lazyfree") & plane(flags, lambda letters: "l" in letters),
            "unreferenced": plane(flags, lambda letters: "r" not in letters),
            "folio_order": orders.astype(np.int8)[None],
        }


@functools.lru_cache(1)
def load(name: str) -> list[Case]:
    """Return the cases of the file called `name` in this directory."""
    with gzip.open(HERE / name, "rt", encoding="utf-8") as lines:
        raws = [json.loads(line) for line in lines]
    return [Case(raw["id"], raw) for raw in raws]


def _shared(pages: NDArray[np.bool_], orders: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which pages lie in a folio that another mm maps.

    The recorded flag is that of the page alone. The kernel asks the folio (folio_maybe_mapped_shared), so one page
    that a child kept makes every page of a large folio shared. Large folios were faulted in, and so lie aligned.
    """
    shared = pages.copy()
    for i in np.flatnonzero(pages & (orders > 0)).tolist():
        order = int(orders[i])
        folio = slice(i >> order << order, (i >> order << order) + (1 << order))
        shared[folio] |= orders[folio] == order
    return shared


def _expanded(runs: Runs) -> Iterator[Any]:
    for value, count in runs:
        for _ in range(count):
            yield value
