"""A golden case's state, built from the frames up, and what pagemap and kpageflags would show of it.

A *stage* is a machine with one mapping of one PMD range, and a child process that shares some of its pages. How a
kernel came to a state (a fault, a fork, MADV_FREE, a pin) is not played again: pages are given the flags and
references that those leave behind.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mthp.errors import UsageError
from mthp.geometry import X86_64, geometry_named
from mthp.sim.buddy import Frames
from mthp.sim.machine import Machine
from mthp.sim.memory import Fl
from mthp.sim.mm import DROPPABLE, HUGEPAGE, LOCKED, NOHUGEPAGE, UFFD_MISSING, UFFD_WP, Mm, P, Pmd, Ptes
from mthp.tunables import Switches, Tunables

MTHP_COLLAPSE = (7, 2)
"""The first release whose khugepaged collapses to orders below PMD order, and counts per size what it does."""

LAZYFREE_STOPS = (7, 1)
"""The first release whose khugepaged leaves ranges with clean lazyfree pages alone."""

_VMA_WORDS = {
    "uffd_wp_registered": UFFD_WP,
    "uffd_missing_registered": UFFD_MISSING,
    "mlocked": LOCKED,
    "droppable": DROPPABLE,
}

_NO_PAGE = {
    "none": np.uint16(0),
    "zero": P.PRESENT | P.ZERO | P.YOUNG,
    "uffd_zero": P.PRESENT | P.ZERO | P.YOUNG | P.UFFD_WP,
    "guard": P.GUARD,
    "uffd_marker": P.UFFD_MARKER | P.UFFD_WP,
}
_SWAPPED = {"swap": P.SWAP, "swap_shared": P.SWAP, "uffd_swap": P.SWAP | P.UFFD_WP}
_CLEAN, _DIRTY = P.PRESENT, P.PRESENT | P.DIRTY
_MAPPED = {
    "anon": _DIRTY,
    "shared": _DIRTY,
    "swapcache": _CLEAN,
    "swapped_back": _CLEAN,
    "cold": _DIRTY,
    "lazyfree": _CLEAN,
    "lazyfree_dirty": _DIRTY,
    "mlocked": _DIRTY,
    "pinned": _DIRTY,
    "uffdwp": _DIRTY | P.UFFD_WP,
    "large": _DIRTY,
    "large_shared": _DIRTY,
}
_ENTRIES = _NO_PAGE | _SWAPPED | _MAPPED
"""The bits of an entry, by the kind of state. PTEs are old: the references that the case has are those of the folio."""

_LARGE = ("large", "large_shared")
_CHILD_HAS = ("shared", "large_shared", "swap_shared")
_NEVER_WRITTEN = {"none", "zero", "uffd_zero", "uffd_marker"}
"""What a mapping can hold without an anon_vma."""

_FOLIO_FLAGS = {"r": Fl.REFERENCED, "m": Fl.MLOCKED}

Runs = list[list[Any]]


def release_of(case: dict[str, Any]) -> tuple[int, int]:
    """Major and minor number of the kernel that a case was recorded on; the newest that is known if it names none.

    Raises:
        UsageError: what it names is no release.
    """
    numbers = str(case.get("kernel", "7.3")).split(".")[:2]
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise UsageError(f"kernel {case['kernel']!r} is no release", help="use two or three numbers: 7.3.4")
    return int(numbers[0]), int(numbers[1])


def runs_of(values: Iterable[Any]) -> Runs:
    """Run lengths: [value, count] of equal neighbours."""
    return [[value, len(list(group))] for value, group in groupby(values)]


@dataclass(frozen=True)
class Observation:
    """What pagemap and kpageflags show of the PMD range.

    Attributes:
        orders: per entry the order of the folio, or a word.
        frames: int64, shape (pages,): frame of a mapped page, else 0.
        flags: per entry the letters of its state, sorted.
        swap: [first entry, slot, count] of adjoining entries with adjoining slots.
        pmd_mapped: whether one PMD entry maps the range.
    """

    orders: list[int | str]
    frames: Frames
    flags: list[str]
    swap: Runs
    pmd_mapped: bool


class Stage:
    """A machine in the state of a case.

    Args:
        case: the JSON object.

    Raises:
        UsageError: a state, a geometry, a size or a limit that does not exist.
    """

    def __init__(self, case: dict[str, Any]) -> None:
        geometry = geometry_named(case["geometry"]) if "geometry" in case else X86_64
        self.n = geometry.ptes_per_pmd
        self.forced = case["trigger"] == "madvise"
        release = release_of(case)
        states = _expanded(case, "before", self.n)
        orders = {state: _order_of(state, geometry.pmd_order) for state in set(states)}
        self._kinds = np.array([state.partition(":")[0] for state in states])
        self._folio_orders = np.array([orders[state] for state in states])
        self._flags = _expanded(case, "before_flags", self.n) if "before_flags" in case else ["r"] * self.n
        if unknown := set(self._kinds) - set(_ENTRIES):
            raise UsageError(f"unknown state {sorted(unknown)[0]!r}", help=f"use {', '.join(_ENTRIES)}")
        self._slots = _slots_of(case, self._kinds)
        self.machine = Machine(
            geometry,
            node_frames=[24 << max(geometry.pmd_order, 10)],
            swap_slots=int(self._slots.max()),
            switches=Switches("madvise", dict.fromkeys(case["orders_enabled"], "madvise")),
            policy="mainline" if release >= MTHP_COLLAPSE else "pmd-only",
            lazyfree_stops=release >= LAZYFREE_STOPS,
            tunables=Tunables.defaults(geometry).replaced(
                geometry, **{name: case[name] for name in ("max_ptes_none", "max_ptes_swap", "max_ptes_shared")}
            ),
        )
        self.start = geometry.pmd_size
        self.mm = self._space({HUGEPAGE} | {_VMA_WORDS[word] for word in case.get("vma", ())})
        self.child = self._space({NOHUGEPAGE})
        self._contents = np.where(np.isin(self._kinds, list(_NO_PAGE)), 0, np.arange(1, self.n + 1))
        self._build()
        self.machine.trace.enabled = True

    def _space(self, flags: set[str]) -> Mm:
        mm = self.machine.create_mm()
        written = not _NEVER_WRITTEN.issuperset(self._kinds)
        self.machine.map(mm, self.start, self.start + self.machine.geometry.pmd_size, flags=flags, anon_vma=written)
        return mm

    def _ptes(self, mm: Mm) -> Ptes:
        return mm.ptes(self.start, self.n)

    def _are(self, *kinds: str) -> NDArray[np.intp]:
        return np.flatnonzero(np.isin(self._kinds, kinds))

    # Building.

    def _build(self) -> None:
        ptes = self._ptes(self.mm)
        ptes.bits[:] = [_ENTRIES[kind] for kind in self._kinds]
        self._build_swapped(ptes, self._are(*_SWAPPED))
        small = self._are(*(kind for kind in _MAPPED if kind not in _LARGE))
        if len(small):
            self._build_small(ptes, small)
        large = self._are(*_LARGE)
        blocks = {(int(order), int(i >> order)) for i, order in zip(large, self._folio_orders[large], strict=True)}
        for order, block in sorted(blocks):
            self._build_large(ptes, order, block << order)
        self._share(ptes, self._are(*_CHILD_HAS))
        for mm in (self.mm, self.child):
            if self._ptes(mm).bits.any():
                mm.set_pmd(self.start, Pmd.TABLE)
        for i in self._are("pinned").tolist():
            self.machine.pin(self.mm, self.start + i * self.machine.geometry.page_size)

    def _build_swapped(self, ptes: Ptes, offsets: NDArray[np.intp]) -> None:
        swap = self.machine.parts.swap
        for i in offsets.tolist():
            swap.take(int(self._slots[i]), i + 1)
        ptes.value[offsets] = self._slots[offsets]
        self.mm.swap_entries += len(offsets)

    def _build_small(self, ptes: Ptes, offsets: NDArray[np.intp]) -> None:
        memory = self.machine.parts.memory
        pfns = memory.alloc_small(len(offsets))
        self.machine.parts.rmap.add_new_anon_small(pfns, swapbacked=True)
        memory.content[pfns] = offsets + 1
        memory.flags[pfns] |= Fl.UPTODATE | Fl.LRU
        letters = [self._flags[i] for i in offsets.tolist()]
        for letter, flag in _FOLIO_FLAGS.items():
            memory.flags[pfns[[letter in text for text in letters]]] |= flag
        memory.flags[pfns[["l" in text for text in letters]]] &= ~Fl.SWAPBACKED
        ptes.value[offsets] = pfns
        self.mm.anon_pages += len(pfns)
        for i in self._are("swapcache").tolist():
            self.machine.parts.swap.add_to_cache(int(ptes.value[i]), int(self._slots[i]))

    def _build_large(self, ptes: Ptes, order: int, first: int) -> None:
        """A folio that was mapped throughout, then unmapped where the case has something else."""
        memory, rmap = self.machine.parts.memory, self.machine.parts.rmap
        size = 1 << order
        head = memory.alloc(order)
        assert head is not None, "a stage has room for every case"
        rmap.add_new_anon(head, self.mm.id, swapbacked=True)
        memory.refcount[head] = size
        memory.content[head : head + size] = np.arange(first + 1, first + 1 + size)
        block = slice(first, first + size)
        mapped = np.isin(self._kinds[block], _LARGE) & (self._folio_orders[block] == order)
        offsets = np.flatnonzero(mapped)
        memory.set(head, Fl.UPTODATE | Fl.LRU)
        letters = "".join(self._flags[first + i] for i in offsets.tolist())
        for letter, flag in _FOLIO_FLAGS.items():
            if letter in letters:
                memory.set(head, flag)
        ptes.value[first + offsets] = head + offsets
        for i in np.flatnonzero(~mapped).tolist():
            rmap.remove_large(head + i, 1, self.mm.id)
            memory.put(head)
        self.mm.anon_pages += len(offsets)

    def _share(self, ptes: Ptes, offsets: NDArray[np.intp]) -> None:
        """Give the child what it has, too."""
        parts, child = self.machine.parts, self._ptes(self.child)
        child.bits[offsets] = ptes.bits[offsets]
        child.value[offsets] = ptes.value[offsets]
        swapped = (ptes.bits[offsets] & P.SWAP) != 0
        parts.swap.count[ptes.value[offsets[swapped]]] += 1
        pfns = ptes.value[offsets[~swapped]].astype(np.int64)
        parts.rmap.add(pfns, self.child.id)
        np.add.at(parts.memory.refcount, parts.memory.heads(pfns), 1)
        self.child.swap_entries += int(swapped.sum())
        self.child.anon_pages += len(pfns)

    # Running, and looking.

    def run_pass(self) -> int | None:
        """A full scan of khugepaged, or one call of MADV_COLLAPSE, whose errno is given."""
        if self.forced:
            return self.machine.madvise_collapse(self.mm, self.start, self.start + self.machine.geometry.pmd_size)
        self.machine.khugepaged.full_scan()
        return None

    def observe(self) -> Observation:
        """What pagemap and kpageflags show now."""
        memory, ptes = self.machine.parts.memory, self._ptes(self.mm)
        frames = np.where(ptes.pages(), ptes.value, 0).astype(np.int64)
        orders: list[int | str] = memory.order[frames].tolist()
        words = {"zero": P.ZERO, "swap": P.SWAP, "guard": P.GUARD, "marker": P.UFFD_MARKER}
        for word, bit in words.items():
            for i in np.flatnonzero(ptes.bits & bit).tolist():
                orders[i] = word
        for i in np.flatnonzero(ptes.bits == 0).tolist():
            orders[i] = "none"
        huge = self.mm.pmd(self.start) is Pmd.HUGE
        return Observation(orders, frames, self._letters(ptes, frames), _swapped(ptes), huge)

    def _letters(self, ptes: Ptes, frames: Frames) -> list[str]:
        memory = self.machine.parts.memory
        flags = memory.flags[memory.heads(frames)]
        pages = ptes.pages()
        planes = {
            "c": pages & ((flags & Fl.SWAPCACHE) != 0),
            "l": pages & ((flags & (Fl.ANON | Fl.SWAPBACKED)) == Fl.ANON),
            "m": pages & ((flags & Fl.MLOCKED) != 0),
            "s": pages & (memory.mapcount[frames] > 1),
            "w": (ptes.bits & P.UFFD_WP) != 0,
        }
        letters = [""] * self.n
        for letter, plane in planes.items():
            for i in np.flatnonzero(plane).tolist():
                letters[i] += letter
        return letters

    def contents(self) -> str:
        """``intact``, or the first page, the child's included, that does not hold what was written there."""
        parts = self.machine.parts
        shared = np.where(np.isin(self._kinds, _CHILD_HAS), self._contents, 0)
        for mm, wanted, whose in ((self.mm, self._contents, "page"), (self.child, shared, "the child's page")):
            ptes = self._ptes(mm)
            held = np.where(ptes.pages(), parts.memory.content[np.where(ptes.pages(), ptes.value, 0)], 0)
            swapped = (ptes.bits & P.SWAP) != 0
            held[swapped] = parts.swap.content[ptes.value[swapped]]
            wrong = np.flatnonzero(held != wanted)
            if len(wrong):
                return f"{whose} {wrong[0]} holds the contents of page {held[wrong[0]] - 1}"
        return "intact"


def _swapped(ptes: Ptes) -> Runs:
    """[first entry, slot, count] of adjoining swap entries with adjoining slots."""
    offsets = np.flatnonzero(ptes.bits & P.SWAP)
    slots = ptes.value[offsets].astype(np.int64)
    starts = np.flatnonzero(np.diff(offsets, prepend=-2) + np.abs(np.diff(slots, prepend=-2) - 1) != 1)
    counts = np.diff(np.append(starts, len(offsets)))
    return [list(run) for run in zip(offsets[starts].tolist(), slots[starts].tolist(), counts.tolist(), strict=True)]


def _order_of(state: str, pmd_order: int) -> int:
    """The order in a state such as ``large:4``; 0 for any other."""
    kind, _, order = state.partition(":")
    if (kind in _LARGE) != (order.isdecimal() and 0 < int(order) <= pmd_order):
        raise UsageError(f"state {state!r} does not exist where the PMD order is {pmd_order}")
    return int(order or 0)


def _slots_of(case: dict[str, Any], kinds: NDArray[np.str_]) -> Frames:
    """The swap slot of each entry that needs one: as recorded, else the next one behind all that are; else 0."""
    slots = np.zeros(len(kinds), np.int64)
    for first, slot, count in case.get("swap_offsets", ()):
        slots[first : first + count] = np.arange(slot, slot + count)
    missing = np.isin(kinds, [*_SWAPPED, "swapcache"]) & (slots == 0)
    slots[missing] = slots.max() + 2 + np.arange(np.count_nonzero(missing))
    return slots


def _expanded(case: dict[str, Any], key: str, size: int) -> list[str]:
    """A run-length list of the case, one word per entry."""
    expanded = [str(value) for value, count in case[key] for _ in range(count)]
    if len(expanded) != size:
        raise UsageError(f"{key} has {len(expanded)} entries, a PMD range has {size}")
    return expanded
