"""A check of the contract of :class:`~mthp.addrspace.AddressSpace`, for any backend.

>>> from mthp.testing import check_address_space
>>> check_address_space(space)
>>> check_address_space(space, collapse=True, end=process.kill)

The live, the simulated and the recorded address space pass it, each as far as it can: a backend raises
:class:`~mthp.errors.UnsupportedError` for operations that it lacks. The target should not run meanwhile. A check that
finds a difference between two reads is repeated a few times before it fails.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from mthp import abilities
from mthp.addrspace import AddressSpace
from mthp.eligibility import eligibility
from mthp.errors import MthpError, TargetVanishedError, UnsupportedError
from mthp.geometry import Geometry
from mthp.means import Means
from mthp.metrics import MAX_FOLIO_ORDER
from mthp.ptes import ORDER_NONE, ORDER_UNKNOWN, Pte, PteColumns, Segment, in_portions, without
from mthp.results import BlockOutcome, ScanResult
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma, VmaKind

MAX_PAGES = 1 << 18
"""The most pages to read, from the lowest address on."""

LOOKS = 3
"""Times that a check is made before a difference counts."""

_NEEDS_PRESENT = Pte.ZERO | Pte.SHARED | Pte.LAZYFREE | Pte.FILE | Pte.PMD_MAPPED | Pte.UNREFERENCED | Pte.HUGETLB


def check_address_space(
    space: AddressSpace,
    *,
    collapse: bool = False,
    orders: Sequence[int] = (),
    end: Callable[[], object] | None = None,
    seed: int = 0,
) -> None:
    """Check `space` against everything that the seam promises.

    Args:
        space: an address space of a stopped target; closed afterwards if `end` is set.
        collapse: also collapse some of it. That changes it; its contents must be expendable.
        orders: the orders to collapse to; the PMD order alone if empty.
        end: ends the target, such as a process's kill; afterwards every operation must report that it vanished.
        seed: seed of the choice of pieces.

    Raises:
        AssertionError: `space` breaks the contract; the message names every violation.
    """
    problems = problems_of(space, collapse=collapse, orders=orders, end=end, seed=seed)
    assert not problems, "\n".join((f"{space.label} does not hold to the seam:", *problems))


def problems_of(
    space: AddressSpace,
    *,
    collapse: bool = False,
    orders: Sequence[int] = (),
    end: Callable[[], object] | None = None,
    seed: int = 0,
) -> list[str]:
    """Return every violation of the contract, as a sentence; arguments as for :func:`check_address_space`."""
    check = _Check(space, random.Random(seed))
    check.descriptions()
    check.mappings()
    check.entries()
    check.pieces()
    check.gaps()
    check.populated()
    if collapse:
        for order in orders or (space.geometry.pmd_order,):
            check.collapse(order)
        check.pauses()
    if end is not None:
        end()
        check.vanished()
        space.close()
        space.close()
    return check.problems


@dataclass
class _Check:
    space: AddressSpace
    chooser: random.Random
    problems: list[str] = field(default_factory=list)

    @property
    def geometry(self) -> Geometry:
        return self.space.geometry

    def expect(self, holds: object, problem: str) -> bool:
        """Note `problem`, once, unless `holds`."""
        if not holds and problem not in self.problems:
            self.problems.append(problem)
        return bool(holds)

    def expect_soon(self, looks_right: Callable[[], bool], problem: str) -> None:
        """Note `problem` unless one of a few tries is right."""
        self.expect(any(looks_right() for _ in range(LOOKS)), problem)

    # The descriptions.

    def descriptions(self) -> None:
        space = self.space
        self.expect(isinstance(space.geometry, Geometry), "geometry is not a Geometry")
        self.expect(isinstance(space.switches, Switches), "switches are not Switches")
        self.expect(isinstance(space.thp_disabled, bool), "thp_disabled is not a bool")
        for name in ("label", "kernel"):
            self.expect(isinstance(getattr(space, name), str) and getattr(space, name), f"{name} is not a text")
        self.expect(
            all(isinstance(each, str) and each for each in space.missing), "missing holds items that are not texts"
        )
        if self.expect(isinstance(space.tunables, Tunables), "tunables are not Tunables"):
            try:
                space.tunables.checked(space.geometry)
            except MthpError as error:
                self.expect(False, f"tunables are not possible: {error}")

    def mappings(self) -> None:
        page, behind = self.geometry.page_size, 0
        for vma in self.space.vmas():
            where = f"the mapping at {vma.start:#x}"
            self.expect(isinstance(vma, Vma) and isinstance(vma.kind, VmaKind), f"{where} is not a Vma")
            self.expect(vma.start >= behind, f"{where} overlaps the one before it, or does not lie behind it")
            self.expect(vma.start < vma.end, f"{where} is empty")
            self.expect(vma.start % page == vma.end % page == 0, f"{where} is not made of whole pages")
            self.expect(len(vma.permissions) == 4, f"{where} has permissions {vma.permissions!r}")
            behind = vma.end
        self.expect_soon(
            lambda: self.space.mapped() == [(vma.start, vma.end) for vma in self.space.vmas()],
            "mapped() does not return the ranges of vmas()",
        )
        self.expect_soon(self._same_with_nodes, "with_nodes() returns other mappings than its argument")

    def _same_with_nodes(self) -> bool:
        vmas = self.space.vmas()
        return [replace(vma, node_pages=()) for vma in abilities.with_nodes(self.space, vmas)] == [
            replace(vma, node_pages=()) for vma in vmas
        ]

    # The entries.

    def segments(self) -> list[Segment]:
        """Return the mappings, from the lowest on, up to `MAX_PAGES` pages."""
        room, page = MAX_PAGES, self.geometry.page_size
        chosen = []
        for start, end in self.space.mapped():
            if room <= 0:
                break
            pages = min(room, (end - start) // page)
            chosen.append((start, start + pages * page))
            room -= pages
        return chosen

    def entries(self) -> None:
        for portion in in_portions(self.segments(), 1 << 26):
            for start, end in portion:
                self._entries_of((start, end))
        empty = self.space.read([])
        self.expect(len(empty.state) == len(empty.folio_order) == 0, "read([]) returns entries")

    def _entries_of(self, segment: Segment) -> None:
        columns = self.space.read([segment])
        pages = (segment[1] - segment[0]) // self.geometry.page_size
        where = f"read of {segment[0]:#x}-{segment[1]:#x}"
        self.expect(tuple(columns.segments) == (segment,), f"{where}: segments are {columns.segments}")
        shapes = columns.state.shape == columns.folio_order.shape == (pages,)
        kinds = (columns.state.dtype, columns.folio_order.dtype) == (np.dtype(np.uint16), np.dtype(np.int8))
        if not self.expect(shapes and kinds, f"{where}: columns of wrong shape or dtype"):
            return
        for wrong, problem in self._contradictions(columns, segment):
            if wrong.any():
                at = segment[0] + int(wrong.argmax()) * self.geometry.page_size
                self.expect(False, f"the page at {at:#x}: {problem}")

    def _contradictions(self, columns: PteColumns, segment: Segment) -> Iterator[tuple[NDArray[np.bool_], str]]:
        """Yield which pages (bool, shape (pages,)) contradict themselves, and how."""
        order, has = columns.folio_order, columns.has
        present, swap, zero, huge = has(Pte.PRESENT), has(Pte.SWAP), has(Pte.ZERO), has(Pte.PMD_MAPPED)
        yield present & swap, "both present and swapped"
        yield has(_NEEDS_PRESENT) & ~present, "not present, with a bit that only a present page has"
        yield zero & has(Pte.SHARED | Pte.LAZYFREE | Pte.FILE), "the zero page, with a bit of a page of one's own"
        yield has(Pte.GUARD) & ~swap, "a guard marker that does not count as a swap entry"
        yield has(Pte.UFFD_WP) & ~(present | swap), "write-protected by userfaultfd, and none"
        yield ~present & (order != ORDER_NONE), "in a folio, and not present"
        yield present & (order == ORDER_NONE), "present, and in no folio"
        yield (order < ORDER_UNKNOWN) | (order > MAX_FOLIO_ORDER), "in a folio of an order that does not exist"
        yield (
            huge & ~zero & (order < self.geometry.pmd_order) & (order >= 0),
            "mapped by a PMD entry, in a smaller folio",
        )
        if columns.pfn is not None:
            yield ~present & (columns.pfn != 0), "not present, and in a frame"
        rows = self._whole_ranges(huge, segment)
        mixed = np.zeros(len(order), np.bool_)
        for start, row in rows:
            mixed[start : start + len(row)] = row.any() and not row.all()
        yield mixed, "in a PMD range of which a PMD entry maps a part"

    def _whole_ranges(self, plane: NDArray[np.bool_], segment: Segment) -> Iterator[tuple[int, NDArray[np.bool_]]]:
        """Yield the whole PMD ranges in a plane of `segment`: index of the first page, and the pages."""
        geometry = self.geometry
        first = -(-segment[0] // geometry.pmd_size) * geometry.pmd_size
        for address in range(first, segment[1] - geometry.pmd_size + 1, geometry.pmd_size):
            at = (address - segment[0]) // geometry.page_size
            yield at, plane[at : at + geometry.ptes_per_pmd]

    def pieces(self) -> None:
        """Check that reads in pieces, and in any order, return the same as one read."""
        for start, end in self._some(self.segments()):
            self.expect_soon(
                lambda start=start, end=end: self._same_in_pieces(start, end),  # type: ignore[misc]
                f"{start:#x}-{end:#x} reads differently in pieces",
            )

    def _same_in_pieces(self, start: int, end: int) -> bool:
        page = self.geometry.page_size
        cuts = sorted({start, end, *(self.chooser.randrange(start, end, page) for _ in range(6))})
        pieces = list(pairwise(cuts))
        whole = self.space.read([(start, end)])
        together = self.space.read(pieces)
        if not _same(whole, together):
            return False
        self.chooser.shuffle(pieces)
        for low, high in pieces:
            part = self.space.read([(low, high)])
            here = slice((low - start) // page, (high - start) // page)
            if not np.array_equal(whole.state[here], part.state):
                return False
        return True

    def _some(self, segments: list[Segment]) -> list[Segment]:
        return self.chooser.sample(segments, min(len(segments), 12))

    def gaps(self) -> None:
        """Check that unmapped addresses read as none."""
        page = self.geometry.page_size
        mapped = self.space.mapped()
        free = [(low, high) for (_, low), (high, _) in pairwise(mapped) if low < high]
        for low, high in self._some(free):
            columns = self.space.read([(low, min(high, low + 4 * page))])
            self.expect(not columns.state.any(), f"entries at {low:#x}, where nothing is mapped")

    def populated(self) -> None:
        """Check that populated() leaves out only none entries, and returns only parts of its argument."""
        segments = self.segments()
        size = self.geometry.pmd_size
        self.expect_soon(lambda: self._nothing_left_out(segments, size), "populated() leaves out ranges with contents")
        for start, end in (found := self.space.populated(segments, size)):
            inside = any(low <= start < end <= high for low, high in segments)
            self.expect(inside, f"populated() returns {start:#x}-{end:#x}, which is not in its argument")
        self.expect(found == sorted(found), "populated() does not ascend")
        overlapping = any(end > start for (_, end), (start, _) in pairwise(found))
        self.expect(not overlapping, "populated() returns overlapping ranges")
        self.expect(self.space.populated([], size) == [], "populated([]) returns ranges")

    def _nothing_left_out(self, segments: list[Segment], granule: int) -> bool:
        found = self.space.populated(segments, granule)
        left = without(segments, found)
        return not any(self.space.read(portion).state.any() for portion in in_portions(left, 1 << 26))

    # Collapsing.

    def collapse(self, order: int) -> None:
        """Collapse one run that should work, one at an unmapped address, and an empty list."""
        nowhere = max((end for _, end in self.space.mapped()), default=0)
        nowhere = -(-nowhere // self.geometry.pmd_size) * self.geometry.pmd_size
        outcome = self._outcome(nowhere, order)
        if outcome is not None:
            self.expect(outcome.result is not ScanResult.SUCCEED, "a collapse where nothing is mapped succeeds")
        self.expect(self._blocks([]) in ([], None), "collapse_blocks([]) returns outcomes")
        address = self._candidate(order)
        if address is not None:
            self._collapse_at(address, order)

    def _outcome(self, address: int, order: int) -> BlockOutcome | None:
        """Return the outcome of one collapse; None if the backend cannot."""
        try:
            return self.space.collapse_blocks([(address, order)], Means("madvise,move", fill=True))[0]
        except UnsupportedError:
            return None

    def _blocks(self, blocks: list[tuple[int, int]]) -> list[BlockOutcome] | None:
        try:
            return self.space.collapse_blocks(blocks, Means("madvise,move", fill=True))
        except UnsupportedError:
            return None

    def _candidate(self, order: int) -> int | None:
        """Return the address of a run full of small pages in a mapping that may be collapsed; None without one."""
        geometry = self.geometry
        for vma in self.space.vmas():
            if not eligibility(vma, geometry, self.space.switches, trigger="madvise", thp_disabled=False):
                continue
            start, end = vma.pmd_ranges(geometry)
            if start >= end:
                continue
            columns = self.space.read([(start, min(end, start + MAX_PAGES * geometry.page_size))])
            plain = columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO | Pte.SHARED | Pte.LAZYFREE | Pte.UFFD_WP)
            full = (plain & (columns.folio_order <= 0)).reshape(-1, 1 << order).all(axis=1)
            if full.any():
                return start + int(full.argmax()) * geometry.size_of(order)
        return None

    def _collapse_at(self, address: int, order: int) -> None:
        geometry, pages = self.geometry, 1 << order
        start = address // geometry.pmd_size * geometry.pmd_size
        around = (start, start + geometry.pmd_size)
        run = slice((address - start) // geometry.page_size, (address - start) // geometry.page_size + pages)
        before, mapped = self.space.read([around]), self.space.mapped()
        outcome = self._outcome(address, order)
        if outcome is None:
            return
        what = f"the collapse of {address:#x} to order {order}"
        self.expect(isinstance(outcome.result, ScanResult), f"{what}: its result is not a ScanResult")
        self.expect(outcome.elapsed_ns >= 0, f"{what} took {outcome.elapsed_ns} ns")
        after = self.space.read([around])
        contents = Pte.PRESENT | Pte.SWAP
        self.expect((after.has(contents) | ~before.has(contents)).all(), f"{what} loses a page")
        self.expect(self.space.mapped() == mapped, f"{what} changes the mappings")
        said = (outcome.address, outcome.order) == (address, order)
        self.expect(said, f"{what}: its outcome is of {outcome.address:#x}, order {outcome.order}")
        if outcome.result is not ScanResult.SUCCEED:
            self.expect(outcome.copied == outcome.filled == 0, f"{what} fails, and copied or filled pages")
            return
        held = int((before.has(contents) & ~before.has(Pte.ZERO))[run].sum())
        sizes = (held, pages - held)
        self.expect((outcome.copied, outcome.filled) == sizes, f"{what}: copied and filled are not {sizes}")
        self.expect(after.has(Pte.PRESENT)[run].all(), f"{what} succeeds, and leaves a page that is not present")
        seen = after.folio_order[run]
        self.expect(((seen == order) | (seen == ORDER_UNKNOWN)).all(), f"{what} succeeds, and the folio is another")
        if order == geometry.pmd_order:
            unseen = (seen == ORDER_UNKNOWN).all()
            self.expect(unseen or after.has(Pte.PMD_MAPPED).all(), f"{what} succeeds, and no PMD entry maps it")
        beside = np.ones(len(after.state), np.bool_)
        beside[run] = False
        ignored = ~np.uint16(Pte.UNREFERENCED)
        same = np.array_equal(after.state[beside] & ignored, before.state[beside] & ignored)
        same &= np.array_equal(after.folio_order[beside], before.folio_order[beside])
        self.expect(same, f"{what} changes its neighbours")
        again = self._outcome(address, order)
        repeated = again is not None and again.result is ScanResult.SUCCEED
        self.expect(again is not None and not repeated, f"{what} cannot be repeated, or succeeds twice")

    def pauses(self) -> None:
        pauses = abilities.take_pauses(self.space)
        self.expect(all(isinstance(pause, int) and pause >= 0 for pause in pauses), f"pauses are {pauses}")
        self.expect(abilities.take_pauses(self.space) == [], "take_pauses() returns the same pauses twice")

    # The end.

    def vanished(self) -> None:
        page, order = self.geometry.page_size, self.geometry.pmd_order
        asked: dict[str, Callable[[], object]] = {
            "vmas()": self.space.vmas,
            "mapped()": self.space.mapped,
            "read()": lambda: self.space.read([(self.geometry.pmd_size, self.geometry.pmd_size + page)]),
            "collapse_blocks()": lambda: self.space.collapse_blocks([(self.geometry.pmd_size, order)], Means()),
        }
        for name, ask in asked.items():
            try:
                ask()
            except (TargetVanishedError, UnsupportedError):
                continue
            self.expect(False, f"{name} does not say that the target vanished")


def _same(one: PteColumns, other: PteColumns) -> bool:
    return np.array_equal(one.state, other.state) and np.array_equal(one.folio_order, other.folio_order)
