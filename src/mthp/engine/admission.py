"""Admission of runs within a bloat budget and the target's memory limits, and their collapse as one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mthp import abilities, thp_unadvised
from mthp.addrspace import AddressSpace
from mthp.budget import AnyAmount, Room, as_amount
from mthp.means import Means
from mthp.ptes import Block, PteColumns, Segment
from mthp.results import BlockOutcome, ScanResult


@dataclass(frozen=True, slots=True)
class Candidate:
    """A run that is about to be tried.

    Attributes:
        space: the address space.
        address: start address of the run.
        order: order of the folio that it would become.
        copied, filled: PTEs of the run with contents, and without.
        swapped: those of `copied` that are swapped out.
    """

    space: AddressSpace
    address: int
    order: int
    copied: int
    filled: int
    swapped: int = 0

    @property
    def block(self) -> Block:
        """The run's address and order."""
        return self.address, self.order


Admit = Callable[[Candidate], ScanResult]
"""Called before each attempt: returns SUCCEED to allow it, or the result to record instead. After a result in
:data:`~mthp.results.LOWER_ORDERS_MAY_SUCCEED` smaller orders are tried at the same place, after PTE_MAPPED_HUGEPAGE
the walk goes on behind the run, and any other result ends the PMD range."""


class Admission:
    """Admits runs while folios, bloat budget and memory are left for them.

    The results in place of an attempt: ALLOC_HUGE_PAGE_FAIL without a free folio, EXCEED_NONE_PTE beyond the bloat
    budget, CGROUP_CHARGE_FAIL if too little memory would stay free, and :data:`mthp.thp_unadvised.RESULT`.

    Args:
        room: the bytes that fit below the target's memory limits.
        bloat_left: returns the bytes that filling may still add; None without a bound.
        available: returns whether the machine has free folios of an order.
        fills: whether attempts below the PMD order fill holes.
    """

    def __init__(
        self,
        space: AddressSpace,
        room: Room,
        bloat_left: Callable[[], int | None],
        *,
        available: Callable[[int], bool] = lambda order: True,
        fills: bool = True,
    ) -> None:
        self.room = room
        self._space = space
        self._bloat_left = bloat_left
        self._available = available
        self._fills = fills
        self._pending = 0
        self._advised: list[Segment] | None = None

    def renew(self) -> None:
        """Begin a batch: settle the previous one, and read the limits again."""
        self.settle()
        self.room.renew()

    def settle(self) -> None:
        """Forget the bytes of admitted runs, because `bloat_left` counts their filled pages by now."""
        self._pending = 0

    def only_advised(self) -> None:
        """From now on admit runs below the PMD order only in advised memory (:mod:`mthp.thp_unadvised`)."""
        if self._advised is None:
            self._advised = thp_unadvised.advised(self._space)

    def __call__(self, candidate: Candidate) -> ScanResult:
        """Return SUCCEED if `candidate` may be tried, and take its share of the budget and the room."""
        geometry = self._space.geometry
        small = candidate.order < geometry.pmd_order
        if small and self._advised is not None and not thp_unadvised.lies_in(candidate.address, self._advised):
            return thp_unadvised.RESULT
        if not self._available(candidate.order):
            return ScanResult.ALLOC_HUGE_PAGE_FAIL
        # MADV_COLLAPSE always fills; below the PMD order only mechanisms that were set to do so.
        fill = candidate.filled * geometry.page_size if self._fills or not small else 0
        left = self._bloat_left()
        if left is not None and fill and self._pending + fill > left:
            return ScanResult.EXCEED_NONE_PTE
        # collapse_huge_page() (mm/khugepaged.c) charges the new folio, and reads swapped pages back, before it frees
        # old pages. The PMD order does so for one range at a time, smaller orders for all blocks of a window.
        swapped = candidate.swapped * geometry.page_size
        at_once = geometry.size_of(candidate.order) + swapped
        if not self.room.take(at_once if small else fill + swapped, at_once):
            return ScanResult.CGROUP_CHARGE_FAIL
        self._pending += fill
        return ScanResult.SUCCEED

    def ended_by(self, result: ScanResult) -> bool:
        """Return whether `result` is a failed charge, after which more attempts could only hurt the target."""
        if result is ScanResult.ALLOC_HUGE_PAGE_FAIL:
            return self.room.limited
        return result is ScanResult.CGROUP_CHARGE_FAIL


def bloat_budget(space: AddressSpace, means: Means) -> int | None:
    """Return the bytes that filling may add to `space` in its present state; None without a bound."""
    return _bytes_of(space, means.max_bloat)


def _bytes_of(space: AddressSpace, bound: AnyAmount) -> int | None:
    amount = as_amount(bound)
    if amount is None or amount.share is None:
        return None if amount is None else amount.size
    return amount.of(abilities.resident_bytes(space))


def copy_budget(space: AddressSpace, means: Means) -> int | None:
    """Return the bytes of `space` in its present state that may be copied; None without a bound."""
    return _bytes_of(space, means.max_copied)


def room_of(space: AddressSpace, means: Means) -> Room:
    """Return the room below the memory limits of `space`."""
    return Room(lambda: abilities.memory_bounds(space), as_amount(means.reserve))


def collapse_batch(
    space: AddressSpace, blocks: Sequence[Block], means: Means, columns: PteColumns | None
) -> list[BlockOutcome]:
    """Collapse `blocks` as one batch, the largest orders first.

    Blocks of one order follow each other, so that the switch of a size is written once in a batch.

    Args:
        columns: entries just read that contain the blocks; None to read them here.

    Returns:
        The outcome of each block, in the order of `blocks`.

    Raises:
        MthpError: as :meth:`mthp.addrspace.AddressSpace.collapse_blocks`.
    """
    by_order = sorted(blocks, key=lambda block: (-block[1], block[0]))
    outcomes = space.collapse_blocks(by_order, means, columns)
    outcomes = thp_unadvised.corrected(space, by_order, outcomes)
    of_block = dict(zip(by_order, outcomes, strict=True))
    return [of_block[block] for block in blocks]
