"""The pages that collapses filled, remembered from one scan to the next.

A collapse with an intermediate ``max_ptes_none`` puts zeroed pages where PTEs were none. The next scan sees pages like
any other, so the run around them looks fuller than it was, and folios grow from scan to scan until a few pages of the
program have become a whole PMD range: creep. The page tables do not tell the two kinds of pages apart, so the scanner
has to remember them. :class:`FilledPages` keeps a bit for every page of the PMD ranges in which anything was filled,
64 bytes for a range of 512 pages. Policies with :attr:`~mthp.engine.policy.Policy.remembers_filled` count these pages
as none.

A later write of the program to such a page is visible only in its contents, which nothing here reads. So
a filled page counts as filled for as long as it is mapped, which errs on the side of less memory. A page that was
unmapped since is forgotten.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from mthp.engine.bits import Bits, set_bits
from mthp.geometry import Geometry


class FilledPages:
    """The filled pages of one address space.

    Args:
        geometry: geometry of its machine.
    """

    def __init__(self, geometry: Geometry) -> None:
        self._geometry = geometry
        self._packed: dict[int, NDArray[np.uint8]] = {}

    def __len__(self) -> int:
        """Return the number of pages that are remembered."""
        return sum(int(set_bits(bits).sum()) for bits in self._packed.values())

    def of(self, addresses: NDArray[np.uint64]) -> Bits | None:
        """Return which pages of some PMD ranges were filled.

        Args:
            addresses: uint64, shape (ranges,): start address of each range.

        Returns:
            bool, shape (ranges, ptes_per_pmd); None if none of them were.
        """
        if not self._packed:
            return None
        found = [(row, bits) for row, at in enumerate(addresses.tolist()) if (bits := self._packed.get(at)) is not None]
        if not found:
            return None
        n = self._geometry.ptes_per_pmd
        plane: Bits = np.zeros((len(addresses), n), np.bool_)
        rows = [row for row, _ in found]
        plane[rows] = np.unpackbits(np.stack([bits for _, bits in found]), axis=1, count=n).view(np.bool_)
        return plane

    def update(self, addresses: NDArray[np.uint64], filled: Bits) -> None:
        """Replace the filled pages of some PMD ranges.

        Args:
            addresses: uint64, shape (ranges,): start address of each range.
            filled: bool, shape (ranges, ptes_per_pmd).
        """
        any_filled = np.logical_or.reduce(filled, axis=1)
        packed = np.packbits(filled, axis=1)
        for address, has, bits in zip(addresses.tolist(), any_filled.tolist(), packed, strict=True):
            if has:
                self._packed[address] = bits.copy()
            else:
                self._packed.pop(address, None)

    def add(self, addresses: NDArray[np.uint64], before: Bits, after: Bits, made: Bits) -> None:
        """Remember the pages that a collapse filled, from the contents of some PMD ranges before and after it.

        Args:
            addresses: uint64, shape (ranges,): start address of each range.
            before: bool, shape (ranges, ptes_per_pmd): pages with contents before; none and zero pages have none.
            after: bool, the same shape: pages with contents afterwards.
            made: bool, the same shape: pages that lie in a folio that the collapse made.
        """
        known = self.of(addresses)
        filled = made & ~before if known is None else (made & ~before) | known
        self.update(addresses, filled & after)

    def forget(self, addresses: Iterable[int]) -> None:
        """Forget whole PMD ranges, such as those of a mapping that is gone."""
        for address in addresses:
            self._packed.pop(address, None)
