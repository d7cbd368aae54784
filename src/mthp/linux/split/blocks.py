"""Make mTHPs in place: MADV_COLLAPSE of a PMD range, then splits down to exactly the planned folios.

Each range is handled by itself: check it (:mod:`mthp.splitchecks`), take room for one PMD folio, collapse it, divide it
(:mod:`~mthp.linux.split.divide`). For a moment the whole range is one PMD folio, with its holes filled with zeroes.
Nothing is injected into the target, no thread of it stops, and no switch changes, so wherever this process ends there
is nothing to undo: at worst a range stays larger than planned.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import numpy as np

from mthp.abilities import memory_bounds, zero_filled
from mthp.blockstates import EXITED
from mthp.budget import AnyAmount, Room, as_amount
from mthp.closing import Closing
from mthp.errors import TargetVanishedError
from mthp.linux.interruptions import interruptions_held_back
from mthp.linux.madvise import Madvise
from mthp.linux.processspace import ProcessSpace
from mthp.linux.split.divide import BACK_OFF, LargeFolio, divider_of
from mthp.linux.split.file import SplitAbility, SplitFile, opened, split_ability
from mthp.linux.split.writes import Part
from mthp.means import Means
from mthp.ptes import Block, Pte, PteColumns
from mthp.results import BlockOutcome, ScanResult
from mthp.splitchecks import RangeLayout, Refusal, layout_of, refusal_of_mapping, refusal_of_pages
from mthp.vma import Vma

RENEW_SECONDS = 0.05
"""Seconds for which the remaining room is valid. The target and its neighbours grow meanwhile."""

LISTING_FACTOR = 20
"""A listing of mappings is used at least this many times as long as it took: a process can have 65 530 mappings."""

UNDIVIDED = "its folio could not be split, as it is pinned, or shared since the collapse"
AT_BASE_PAGES = f"{UNDIVIDED}; it was brought back to base pages"
STAYS = "{pages} pages of zeroes that the collapse added to its PMD range stay: its folio is pinned or shared since"


class SplitBlocks(Closing):
    """A maker of folios below the PMD order in the memory of one process.

    Args:
        ability: the kernel's ability to split; found by trials if None.
        file: the file to split by; the system's if None.
        clock: the time, in seconds.

    Raises:
        NotPermittedError, UnsupportedError: folios cannot be split here.
        TargetVanishedError: the process is gone.
    """

    def __init__(
        self,
        space: ProcessSpace,
        ability: SplitAbility | None = None,
        file: SplitFile | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._space, self._geometry, self._madvise = space, space.geometry, Madvise(space)
        ability = split_ability(self._geometry) if ability is None else ability
        # Before anything is opened: a kernel that cannot split would leave every range as one filled PMD folio.
        ability.require_split()
        self._mappings = _ListedMappings(space, clock)
        self._rooms: dict[AnyAmount, _RenewedRoom] = {}
        self._divider = divider_of(space, opened() if file is None else file, ability)
        self._calls_ns: list[int] = []

    def close(self) -> None:
        self._divider.close()

    def collapse(self, blocks: Sequence[Block], means: Means) -> list[BlockOutcome]:
        """Collapse disjoint `blocks`, one PMD range after the other; return the outcome of each, in their order.

        Other large folios in their ranges keep their size.

        Raises:
            NotPermittedError, UnsupportedError: the kernel's call fails.
            TargetVanishedError: the process is gone.
        """
        size = self._geometry.pmd_size
        room = self._room(means)
        mappings = self._mappings
        ranges: dict[int, list[Block]] = {}
        for block in blocks:
            # MADV_COLLAPSE makes whole PMD ranges only, so the blocks of one range share a collapse.
            ranges.setdefault(block[0] // size * size, []).append(block)
        outcomes: dict[Block, BlockOutcome] = {}
        ended: BlockOutcome | None = None
        for start, chosen in ranges.items():
            if ended is not None:
                outcomes |= _alike(chosen, ended)
                continue
            vma, refusal = mappings.at(start)
            if vma is None or refusal is not None:
                result, reason = refusal or (ScanResult.VMA_NULL, "")
                outcomes |= _alike(chosen, BlockOutcome(start, 0, result, reason))
                continue
            try:
                # An interrupt between the collapse and the splits would leave the range filled.
                with interruptions_held_back():
                    outcomes |= self._range(start, chosen, vma, room, means.min_split_share)
            except TargetVanishedError:
                outcomes |= _alike(chosen, BlockOutcome(start, 0, ScanResult.ANY_PROCESS, EXITED))
            last = outcomes[chosen[-1]]
            ended = last if last.everywhere or last.result is ScanResult.ANY_PROCESS else None
        return [outcomes[block] for block in blocks]

    def take_calls(self) -> list[int]:
        """Return the durations of the collapses and splits since the last call, in nanoseconds."""
        calls = self._calls_ns + self._divider.calls_ns
        self._calls_ns, self._divider.calls_ns = [], []
        return calls

    def _room(self, means: Means) -> _RenewedRoom:
        """Return the room below the limits of the target, kept from call to call."""
        if means.reserve not in self._rooms:
            self._rooms[means.reserve] = _RenewedRoom(self._space, means)
        return self._rooms[means.reserve]

    def _range(
        self, start: int, blocks: list[Block], vma: Vma, room: _RenewedRoom, share: float
    ) -> dict[Block, BlockOutcome]:
        """Make the blocks of one PMD range, if they are at least this share of its contents; return their outcomes."""
        begin = time.perf_counter_ns()
        geometry = self._geometry
        columns = self._space.read([(start, start + geometry.pmd_size)])
        layout = layout_of(start, blocks, columns, geometry)
        # The kernel keeps zeroes in locked memory (try_to_map_unused_to_zeropage(), mm/migrate.c).
        if refusal := refusal_of_pages(layout, columns, locked="lo" in vma.flags, least_share=share):
            return _alike(blocks, BlockOutcome(start, 0, *refusal))
        if not room.take(layout):
            why = BlockOutcome(start, 0, ScanResult.CGROUP_CHARGE_FAIL, room.reason, everywhere=True)
            return _alike(blocks, why)
        collapsed = self._madvise.collapse_range(start)
        self._calls_ns.append(collapsed.elapsed_ns)
        if collapsed.result is not ScanResult.SUCCEED:
            # The target is at a limit, although there was room a moment ago.
            charge = collapsed.result is ScanResult.CGROUP_CHARGE_FAIL
            full = charge or (collapsed.result is ScanResult.ALLOC_HUGE_PAGE_FAIL and room.limited)
            return _alike(blocks, dataclasses.replace(collapsed, everywhere=full))
        folio = self._divider.folio_at(start, geometry.pmd_order)
        results = dict.fromkeys(blocks, (ScanResult.SUCCEED, ""))
        # Without a folio the range was split or unmapped again at once, and the page tables will show it. A folio that
        # was pinned or shared since the collapse cannot be divided, and goes to base pages for the sake of its fill.
        if folio is not None:
            refused = self._divider.divide(folio, layout.orders)
            results |= self._given_back(folio, layout, refused, blocks)
        # A look at the entries alone rules fill out for almost every range.
        left = self._left_filled(folio, layout) if self._divider.holds(start, layout.spare) else 0
        elapsed = (time.perf_counter_ns() - begin) // len(blocks)
        outcomes = {block: BlockOutcome(*block, *end, elapsed_ns=elapsed) for block, end in results.items()}
        if left:
            first = blocks[0]
            outcomes[first] = dataclasses.replace(outcomes[first], reason=STAYS.format(pages=left), left_filled=left)
        return outcomes

    def _given_back(
        self, folio: LargeFolio, layout: RangeLayout, refused: list[Part], blocks: list[Block]
    ) -> dict[Block, tuple[ScanResult, str]]:
        """Bring undivided parts to base pages where they hold more than was planned.

        Returns:
            Result and reason of the blocks in these parts.
        """
        results = {}
        for part in refused:
            why = UNDIVIDED
            if layout.spare[part.pages].any() and self._divider.to_base_pages(folio, part, layout.holes):
                why = AT_BASE_PAGES
            for address, order in blocks:
                first = (address - folio.address) // self._geometry.page_size
                if part.pages.start <= first < part.pages.stop:
                    results[address, order] = (ScanResult.PAGE_COUNT, why)
        return results

    def _left_filled(self, folio: LargeFolio | None, layout: RangeLayout) -> int:
        """Return the number of zero-filled pages that the collapse added outside of the blocks and that still exist."""
        columns = self._settled(layout)
        # Compaction may have moved the folio, or a part of it, to other frames between two steps (migrate_pages(),
        # mm/migrate.c): such parts are still whole, and are divided where they are now.
        moved = moved_folios(folio, layout, columns, self._geometry.page_size)
        for each in moved:
            first = (each.address - layout.start) // self._geometry.page_size
            self._divider.divide(each, layout.orders[first : first + (1 << each.order)])
        if moved:
            columns = self._settled(layout)
        # Pages that the target wrote to meanwhile are its own.
        kept = layout.spare & columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO)
        return int((kept & zero_filled(self._space, columns)).sum())

    def _settled(self, layout: RangeLayout) -> PteColumns:
        """Return the entries of a range, read again while compaction moves pages outside of the blocks."""
        for pause in (*BACK_OFF, 0.0):
            columns = self._space.read([(layout.start, layout.start + self._geometry.pmd_size)])
            # A migration entry: pagemap shows it as swapped, and what it holds is unknown until it is resolved.
            if not (layout.spare & columns.has(Pte.SWAP)).any():
                break
            time.sleep(pause)
        return columns


def moved_folios(
    folio: LargeFolio | None, layout: RangeLayout, columns: PteColumns, page_size: int
) -> list[LargeFolio]:
    """Return the folios with fill that are larger than planned and outside of the frames of `folio`.

    Args:
        folio: the folio of the whole range after its collapse; None if it was not found.
        columns: the present entries of the range.
        page_size: in bytes.
    """
    if columns.pfn is None:
        return []
    found: dict[int, LargeFolio] = {}
    frames = columns.pfn.tolist()
    larger = layout.spare & columns.has(Pte.PRESENT) & (columns.folio_order > layout.orders)
    for page in np.flatnonzero(larger).tolist():
        order = int(columns.folio_order[page])
        first = page - frames[page] % (1 << order)
        # A folio that mremap(2) has moved within its range may reach over the ends of the range.
        inside = first >= 0 and first % (1 << order) == 0
        if inside and (folio is None or frames[page] != folio.pfn + page):
            address = layout.start + first * page_size
            found[first] = LargeFolio(address, frames[page] - page + first, order)
    return list(found.values())


class _ListedMappings:
    """The mappings of the target, listed again from time to time."""

    def __init__(self, space: ProcessSpace, clock: Callable[[], float]) -> None:
        self._space, self._clock = space, clock
        self._until = 0.0
        self._vmas: list[Vma] = []

    def at(self, start: int) -> tuple[Vma | None, Refusal | None]:
        """Return the mapping in which the PMD range at `start` begins, and the reason not to collapse there, if any."""
        # An old listing does no harm: the kernel checks the mapping itself (hugepage_vma_revalidate(),
        # mm/khugepaged.c), and memory that was locked since keeps its fill, which is reported.
        is_old = self._clock() < self._until
        if not is_old:
            self._list()
        vma, refusal = self._look(start)
        # Nothing is refused because of an old listing.
        if refusal is not None and is_old:
            self._list()
            vma, refusal = self._look(start)
        return vma, refusal

    def _list(self) -> None:
        begin = self._clock()
        self._vmas = self._space.vmas()
        self._thp_disabled = self._space.thp_disabled
        self._starts = np.array([vma.start for vma in self._vmas], np.uint64)
        now = self._clock()
        self._until = now + max(RENEW_SECONDS, LISTING_FACTOR * (now - begin))

    def _look(self, start: int) -> tuple[Vma | None, Refusal | None]:
        at = int(np.searchsorted(self._starts, start, side="right")) - 1
        vma = self._vmas[at] if at >= 0 and start < self._vmas[at].end else None
        return vma, refusal_of_mapping(vma, start, self._space.geometry, thp_disabled=self._thp_disabled)


class _RenewedRoom:
    """The room for one PMD folio, computed again from time to time."""

    def __init__(self, space: ProcessSpace, means: Means) -> None:
        self._geometry = space.geometry
        self._room = Room(lambda: memory_bounds(space), as_amount(means.reserve))
        self._asked = time.monotonic()

    def take(self, layout: RangeLayout) -> bool:
        """Take room for one range; return whether it fits."""
        if time.monotonic() - self._asked > RENEW_SECONDS:
            self._room.renew()
            self._asked = time.monotonic()
        page_size = self._geometry.page_size
        swapped = layout.swapped * page_size
        # For a moment the whole folio: it is charged, and swapped pages are read back, before any page is freed
        # (collapse_huge_page(), mm/khugepaged.c).
        return self._room.take(layout.fill * page_size + swapped, self._geometry.pmd_size + swapped)

    @property
    def limited(self) -> bool:
        return self._room.limited

    @property
    def reason(self) -> str:
        return f"for a moment it takes {self._geometry.label(self._geometry.pmd_order)}: {self._room.reason}"


def _alike(blocks: Sequence[Block], outcome: BlockOutcome) -> dict[Block, BlockOutcome]:
    """Return one outcome for each of `blocks`."""
    return {block: dataclasses.replace(outcome, address=block[0], order=block[1]) for block in blocks}
