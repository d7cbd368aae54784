"""The counts of every aligned run of PMD ranges, by property of their PTEs.

The walk of a collapse needs one number over and over: of the 2**k PTEs of an aligned run, how many are occupied
(swapped out, shared, ...)? All runs of an order tile the range, and a run of order k is two runs of order k - 1, so the
counts of every order form a pyramid. Its base are packed bits, eight PTEs to a byte: the population counts of bytes are
the runs of order 3 (and of order 2, by nibbles), those of 64 bits the runs of order 6. Each other level is the sum of
neighbouring pairs of the level below. The whole pyramid costs little more than packing the bits, for all PMD ranges
together, and levels that no policy needs are never made.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from mthp.engine.bits import PART_ORDER, Bits, Counts, nibble_counts, packed_bits, pair_sums, set_bits
from mthp.engine.planes import Planes
from mthp.geometry import Geometry


class Occupancy:
    """The counts of every aligned run of some PMD ranges, computed at first use.

    All counts of order k have the shape (ranges, ptes_per_pmd >> k): uint8 up to order 7, uint16 above. A missing plane
    counts 0 everywhere, as an array that broadcasts.

    Attributes:
        given: names of the planes that are not None.
    """

    def __init__(self, planes: Planes, geometry: Geometry) -> None:
        self.geometry = geometry
        self.given = frozenset(f.name for f in fields(planes) if getattr(planes, f.name) is not None)
        self._whole = planes
        self._source: tuple[Occupancy, NDArray[np.intp]] | None = None
        self._ptes = geometry.ptes_per_pmd
        self._packed: dict[str, NDArray[np.uint8] | None] = {}
        self._counts: dict[tuple[str, int], Counts] = {}
        self._largest: dict[int, NDArray[np.int8]] = {}

    def parts(self, parts: NDArray[np.intp]) -> Occupancy:
        """Return the occupancy of some parts of the PMD ranges, which reuses the packed bits of this one.

        Args:
            parts: int, shape (parts,): indices among the parts of all ranges.
        """
        some = Occupancy(self._whole, self.geometry)
        some._source = self, parts
        some._ptes = 1 << PART_ORDER
        return some

    @cached_property
    def planes(self) -> Planes:
        """The planes of these PMD ranges, or parts."""
        return self._whole if self._source is None else self._source[0].planes.in_parts().chosen(self._source[1])

    def runs(self, order: int) -> Runs:
        """Return the aligned runs of `order`."""
        return Runs(self, order)

    def count(self, name: str, order: int) -> Counts:
        """Return the number of PTEs of plane `name` in each run of `order`.

        Args:
            name: ``occupied``, ``referenced``, ``swap``, ``guard``, ``shared``, ``zero``, ``lazyfree``, ``uffd`` or
                ``outside``.
            order: 2 or above.
        """
        key = name, order
        if key not in self._counts:
            # Orders 2, 3 and 6 are counted from the packed bits, in half bytes, bytes and words.
            if order > 6 or 3 < order < 6:
                self._counts[key] = pair_sums(self.count(name, order - 1), order)
            elif (packed := self._pack(name)) is None:
                # One row, which broadcasts over all ranges.
                self._counts[key] = np.zeros((1, self._ptes >> order), np.uint8)
            elif order == 2:
                self._counts[key] = nibble_counts(packed)
            else:
                # From bytes to words of eight at once, because most ranges need only the counts of large runs.
                self._counts[key] = set_bits(packed if order == 3 else packed.view(np.uint64))
        return self._counts[key]

    def chunks(self, chunk_order: int, order: int, none: int) -> Counts:
        """Return the number of chunks of 2**chunk_order PTEs in each run of `order` with a bit in the seed's bitmap.

        A chunk has a bit if at most `none` of its PTEs are none or zero, and the last one maps a page, because the scan
        sets the bit when it passes that page. A swap entry does not count as none.
        """
        key = f"chunks of {chunk_order} with {none} none", order
        if key not in self._counts:
            if order == chunk_order + 3:
                self._counts[key] = set_bits(self.chunks(chunk_order, chunk_order, none).view(np.uint64))
            elif order > chunk_order:
                self._counts[key] = pair_sums(self.chunks(chunk_order, order - 1, none), order)
            elif chunk_order == 3 and not none and "swap" not in self.given:
                packed = self._pack("occupied")
                assert packed is not None
                self._counts[key] = (packed == 255).view(np.uint8)
            else:
                size, swap = 1 << chunk_order, "swap" in self.given
                contents = self.count("occupied", chunk_order)
                bits: Bits = contents >= max(size - none, 0)
                if swap:
                    bits = contents + self.count("swap", chunk_order) >= max(size - none, 0)
                if none or swap:
                    bits &= self.planes.occupied[:, size - 1 :: size]
                self._counts[key] = bits.view(np.uint8)
        return self._counts[key]

    def largest(self, order: int) -> NDArray[np.int8] | None:
        """Return the order of the largest folio that each run of `order` touches: int8; None without that plane."""
        folio_order = self.planes.folio_order if "folio_order" in self.given else None
        if folio_order is None:
            return None
        if order not in self._largest:
            below = self.largest(order - 1) if order else None
            if below is None:
                self._largest[order] = np.where(self.planes.occupied, folio_order, np.int8(0))
            else:
                self._largest[order] = np.maximum(below[:, 0::2], below[:, 1::2])
        return self._largest[order]

    def packed_present(self) -> NDArray[np.uint8]:
        """Return the packed bits of the present pages: bit i of byte j is PTE 8 * j + i."""
        packed = self._pack("present" if "zero" in self.given else "occupied")
        assert packed is not None
        return packed

    def _pack(self, name: str) -> NDArray[np.uint8] | None:
        """Return the packed bits of plane `name`; None without that plane."""
        if name not in self._packed:
            if self._source is not None:
                packed = self._source[0]._pack(name)
                packed = (
                    None if packed is None else packed.view(np.uint64).reshape(-1, 1)[self._source[1]].view(np.uint8)
                )
            else:
                plane = self._plane(name)
                packed = None if plane is None else packed_bits(plane)
            self._packed[name] = packed
        return self._packed[name]

    def _plane(self, name: str) -> Bits | None:
        """Return the plane called `name`, with only the bits set that are valid for the PTE."""
        planes = self.planes
        if name == "occupied":
            return planes.occupied
        if name == "referenced":
            return planes.occupied if planes.unreferenced is None else planes.occupied & ~planes.unreferenced
        plane: Bits | None = getattr(planes, name)
        if plane is None or name in ("present", "zero", "swap", "guard", "outside"):
            return plane
        contents = planes.occupied
        if name == "uffd" and planes.swap is not None:
            contents = contents | planes.swap
        if name == "lazyfree" and planes.droppable is not None:
            contents = contents & ~planes.droppable[:, None]
        return plane & contents


@dataclass(frozen=True, slots=True)
class Runs:
    """All aligned runs of one order, as a policy sees them. Arrays have the shape (ranges, runs per range)."""

    occupancy: Occupancy
    order: int

    @property
    def size(self) -> int:
        """PTEs in a run."""
        return 1 << self.order

    @property
    def occupied(self) -> Counts:
        """Present, non-zero PTEs."""
        return self.occupancy.count("occupied", self.order)

    @property
    def referenced(self) -> Counts:
        """Occupied PTEs with a page that was used recently, as far as known."""
        if "unreferenced" not in self.occupancy.given:
            return self.occupied
        return self.occupancy.count("referenced", self.order)

    @property
    def swap(self) -> Counts:
        """Swapped-out PTEs."""
        return self.occupancy.count("swap", self.order)

    @property
    def shared(self) -> Counts:
        """PTEs with a page that is also mapped by another process."""
        return self.occupancy.count("shared", self.order)

    @property
    def none_or_zero(self) -> Counts:
        """PTEs that a collapse would fill: none, or the zero page."""
        contents = self.occupied + self.swap if "swap" in self.occupancy.given else self.occupied
        none_or_zero: Counts = contents.dtype.type(self.size) - contents
        return none_or_zero

    @property
    def largest_folio(self) -> NDArray[np.int8] | None:
        """Order of the largest folio that the run touches; None if folios are unknown."""
        return self.occupancy.largest(self.order)

    def chunks(self, chunk_order: int, none: int) -> Counts:
        """Return the chunks of 2**chunk_order PTEs with at most `none` none PTEs, and a page at the end."""
        return self.occupancy.chunks(chunk_order, self.order, none)
