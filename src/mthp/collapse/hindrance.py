"""What stops a scan or an attempt, PTE by PTE, as the kernel would meet it.

The kernel walks the PTEs of a run upwards and stops at the first hindrance; which of several it meets first decides
what happens next (a run with a large folio is skipped, one with too many shared pages is tried at smaller orders).
The walk of a plan needs no more than counts for almost all runs. This module looks at single PTEs, and is asked
about those runs only in which counts do not settle it: each hindrance gets the position of the PTE at which it
strikes, and the smallest position wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from mthp.collapse.occupancy import Bits, Planes
from mthp.collapse.policy import Limits
from mthp.results import ScanResult

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True, slots=True)
class Checks:
    """Which hindrances count, for runs of one order.

    Attributes:
        limits: how many PTEs of each kind may be there.
        zero_none_if_armed: no none PTE may be there where the mapping is armed with userfaultfd.
        uffd, lazyfree: write-protected PTEs and clean lazyfree pages hinder.
        large: a page in a folio of this order or larger hinders; None if it does not.
        swap_first: too many swap entries are met before anything else (swap-in comes before isolation).
        references: some page must have been referenced, or LACK_REFERENCED_PAGE; with swap entries in the run at
            least this many if it is above 1.
    """

    limits: Limits
    zero_none_if_armed: bool = True
    uffd: bool = False
    lazyfree: bool = False
    large: int | None = None
    swap_first: bool = False
    references: int = 0


def first_hindrances(
    planes: Planes, order: int, rows: NDArray[np.intp], offsets: NDArray[np.intp], checks: Checks
) -> NDArray[np.int8]:
    """The scan result of each of some runs of one order.

    Args:
        planes: of the PMD ranges.
        rows: int, shape (runs,): the PMD range of each run.
        offsets: int, shape (runs,): its first PTE, a multiple of 2**order.
        checks: which hindrances count.

    Returns:
        int8, shape (runs,): :class:`~mthp.results.ScanResult`, SUCCEED where nothing hinders.
    """
    run = _RunPlanes(planes, order, rows, offsets)
    occupied = run.of(planes.present)
    if (zero := run.plane("zero")) is not None:
        occupied &= ~zero
    swap = run.plane("swap")
    none = ~occupied if swap is None else ~(occupied | swap)
    none_limit: NDArray[np.intp] = np.full(len(rows), checks.limits.none)
    if checks.zero_none_if_armed and planes.uffd_armed is not None:
        none_limit[planes.uffd_armed[rows]] = 0

    first = _First(len(rows), 1 << order)
    first.meet(_exceeds(none, none_limit), ScanResult.EXCEED_NONE_PTE)
    swap_positions = None if swap is None else _exceeds(swap, np.full(len(rows), checks.limits.swap))
    if swap_positions is not None:
        first.meet(swap_positions, ScanResult.EXCEED_SWAP_PTE)
    uffd = run.plane("uffd") if checks.uffd else None
    if uffd is not None:
        contents = occupied if swap is None else occupied | swap
        first.meet(_first_set(uffd & contents), ScanResult.PTE_UFFD)
    lazyfree = run.plane("lazyfree") if checks.lazyfree else None
    if lazyfree is not None:
        clean = lazyfree & occupied
        if planes.droppable is not None:
            clean &= ~planes.droppable[rows, None]
        first.meet(_first_set(clean), ScanResult.PAGE_LAZYFREE)
    shared = run.plane("shared")
    if shared is not None:
        limit: NDArray[np.intp] = np.full(len(rows), checks.limits.shared)
        first.meet(_exceeds(shared & occupied, limit), ScanResult.EXCEED_SHARED_PTE)
    if checks.large is not None and planes.folio_order is not None:
        large = run.of(planes.folio_order) >= checks.large
        first.meet(_first_set(large & occupied), ScanResult.PTE_MAPPED_HUGEPAGE)
    if checks.swap_first and swap_positions is not None:
        first.override(swap_positions, ScanResult.EXCEED_SWAP_PTE)
    if checks.references:
        unreferenced = run.plane("unreferenced")
        referenced = (occupied if unreferenced is None else occupied & ~unreferenced).sum(axis=1)
        needed = np.ones(len(rows), np.intp)
        if swap is not None:
            needed[swap.any(axis=1)] = max(1, checks.references)
        first.finish(referenced < needed, ScanResult.LACK_REFERENCED_PAGE)
    return first.result


class _RunPlanes:
    """Cuts the PTEs of some runs out of planes."""

    def __init__(self, planes: Planes, order: int, rows: NDArray[np.intp], offsets: NDArray[np.intp]) -> None:
        self._planes = planes
        self._size = 1 << order
        self._rows = rows
        self._indices = offsets >> order

    def of(self, plane: NDArray[T]) -> NDArray[T]:
        """The runs' part of `plane`: shape (runs, 2**order)."""
        cut: NDArray[T] = plane.reshape(plane.shape[0], -1, self._size)[self._rows, self._indices]
        return cut

    def plane(self, name: str) -> Bits | None:
        """The runs' part of the plane called `name`; None if it was not given."""
        plane: Bits | None = getattr(self._planes, name)
        return None if plane is None else self.of(plane)


class _First:
    """Keeps, for each run, the hindrance at the lowest position; of two at one PTE the one that was met first."""

    def __init__(self, runs: int, size: int) -> None:
        self._at = np.full(runs, size, np.intp)
        self._size = size
        self.result: NDArray[np.int8] = np.full(runs, ScanResult.SUCCEED, np.int8)

    def meet(self, positions: NDArray[np.intp], result: ScanResult) -> None:
        """Count a hindrance that strikes at `positions`, 2**order meaning nowhere."""
        earlier = positions < self._at
        self._at[earlier] = positions[earlier]
        self.result[earlier] = result

    def override(self, positions: NDArray[np.intp], result: ScanResult) -> None:
        """Count a hindrance before all others wherever it strikes at all."""
        self.result[positions < self._size] = result

    def finish(self, lacking: Bits, result: ScanResult) -> None:
        """Count what is found out only after the last PTE."""
        self.result[lacking & (self.result == ScanResult.SUCCEED)] = result


def _first_set(bits: Bits) -> NDArray[np.intp]:
    """The position of the first set bit in each row; the row's length if there is none."""
    positions: NDArray[np.intp] = np.where(bits.any(axis=1), bits.argmax(axis=1), bits.shape[1])
    return positions


def _exceeds(bits: Bits, limit: NDArray[np.intp]) -> NDArray[np.intp]:
    """The position at which the set bits of each row become more than `limit`; the row's length if never."""
    return _first_set(np.cumsum(bits, axis=1, dtype=np.uint16) > limit[:, None])
