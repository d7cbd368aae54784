"""The contents of PMD ranges: planes of bits over their PTEs, and the counts of every aligned run.

The walk of a collapse needs one number over and over: of the 2**k PTEs of an aligned run, how many are occupied
(swapped out, shared, ...)? All runs of an order tile the range, and a run of order k is two runs of order k - 1, so the
counts of every order form a pyramid. Its base are packed bits, eight PTEs to a byte: the population counts of bytes are
the runs of order 3 (and of order 2, by nibbles), those of 64 bits the runs of order 6. Each other level is the sum of
neighbouring pairs of the level below. The whole pyramid costs little more than packing the bits, for all PMD ranges
together, and levels that no policy needs are never made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mthp.engine.bits import PART_ORDER, Bits, Counts, nibble_counts, packed_bits, pair_sums, set_bits
from mthp.errors import UsageError
from mthp.geometry import Geometry
from mthp.ptes import ORDER_UNKNOWN, Pte, PteColumns


@dataclass(frozen=True, slots=True)
class Planes:
    """The PTEs of some PMD ranges, one plane of bits per property.

    Every plane has the shape (ranges, ptes_per_pmd); None stands for a plane without a set bit.

    Attributes:
        present: bool; a page is mapped, the zero page included.
        zero: bool; the shared zero page is mapped. Only where `present` is.
        swap: bool; a swap entry, or a marker that counts as one. Only where `present` is not.
        guard: bool; a guard marker, which counts as a swap entry that cannot be read back. Only where `swap` is.
        shared: bool; the page is also mapped by another process.
        lazyfree: bool; freed with MADV_FREE and clean.
        uffd: bool; write-protected by userfaultfd: a page or a swap entry.
        unreferenced: bool; not used recently.
        folio_order: int8; order of the folio that the page lies in.
        filled: bool; a collapse made the page where none was. Policies that remember this count it as none
            (:mod:`mthp.engine.filled`), others as any page.
        outside: bool; the entry does not belong to the mapping, so no run with it is collapsed. No other bit is set
            there.
        pmd_mapped: bool, shape (ranges,); one PMD entry already maps the whole range.
        uffd_armed: bool, shape (ranges,); the mapping is registered with userfaultfd.
        droppable: bool, shape (ranges,); the mapping is VM_DROPPABLE.
    """

    present: Bits
    zero: Bits | None = None
    swap: Bits | None = None
    guard: Bits | None = None
    shared: Bits | None = None
    lazyfree: Bits | None = None
    uffd: Bits | None = None
    unreferenced: Bits | None = None
    folio_order: NDArray[np.int8] | None = None
    filled: Bits | None = None
    outside: Bits | None = None
    pmd_mapped: Bits | None = None
    uffd_armed: Bits | None = None
    droppable: Bits | None = None

    @classmethod
    def checked(cls, present: ArrayLike, others: Mapping[str, ArrayLike | None]) -> Planes:
        """Return planes made from a caller's arrays.

        Args:
            present: bool or integer, shape (ranges, ptes_per_pmd).
            others: the other planes by name; scalars are allowed for the planes of shape (ranges,).

        Raises:
            UsageError: a wrong shape or dtype, or planes that contradict each other.
        """
        bits = _as_bits(present, "present")
        if bits.ndim != 2:
            raise UsageError(f"present has shape {bits.shape}: it must be (ranges, PTEs per PMD range)")
        given: dict[str, NDArray[np.bool_] | NDArray[np.int8]] = {}
        for name, plane in others.items():
            if plane is None or plane is False:
                continue
            array = _as_orders(plane) if name == "folio_order" else _as_bits(plane, name)
            shape = bits.shape[:1] if name in _PER_RANGE else bits.shape
            if name in _PER_RANGE and array.ndim == 0:
                array = np.full(shape, array)
            if array.shape != shape:
                raise UsageError(f"{name} has shape {array.shape}, present has {bits.shape}: it must have {shape}")
            given[name] = array
        swap = given.get("swap")
        if swap is not None and bool((bits & swap).any()):
            raise UsageError("a PTE cannot be both present and swapped: present and swap overlap")
        guard = given.get("guard")
        if guard is not None and bool((guard & ~(False if swap is None else swap)).any()):
            raise UsageError("a guard marker counts as a swap entry: guard has bits that swap lacks")
        zero = given.get("zero")
        if zero is not None and bool((zero & ~bits).any()):
            raise UsageError("a zero page is present: zero has bits that present lacks")
        return cls(bits, **given)  # type: ignore[arg-type]

    def in_parts(self) -> Planes:
        """Return the planes of all parts of the PMD ranges, one row a part."""
        parts = self.present.shape[1] >> PART_ORDER
        planes = ((f.name, getattr(self, f.name)) for f in fields(self))
        return Planes(
            **{
                name: plane.repeat(parts) if name in _PER_RANGE else plane.reshape(-1, 1 << PART_ORDER)
                for name, plane in planes
                if plane is not None
            }
        )

    def chosen(self, rows: slice | Bits | NDArray[np.intp]) -> Planes:
        """Return the planes of some PMD ranges: a slice of them, as views, or those that a mask or indices choose."""
        planes = ((f.name, getattr(self, f.name)) for f in fields(self))
        return replace(self, **{name: plane[rows] for name, plane in planes if plane is not None})

    def without_filled(self) -> Planes:
        """Return the planes without the pages that collapses filled."""
        if self.filled is None:
            return self
        return replace(
            self,
            present=self.present & ~self.filled,
            zero=None if self.zero is None else self.zero & ~self.filled,
            filled=None,
        )

    @property
    def occupied(self) -> Bits:
        """Pages with contents: present and not the zero page. Bool, shape (ranges, ptes_per_pmd)."""
        return self.present if self.zero is None else self.present & ~self.zero


_PER_RANGE = ("pmd_mapped", "uffd_armed", "droppable")


def _as_bits(plane: ArrayLike, name: str) -> Bits:
    array = _as_array(plane, name)
    if array.dtype == np.bool_:
        return array
    bits: Bits = array != 0
    return bits


def _as_orders(plane: ArrayLike) -> NDArray[np.int8]:
    array = _as_array(plane, "folio_order")
    if array.size and not ORDER_UNKNOWN <= array.min() <= array.max() <= np.iinfo(np.int8).max:
        raise UsageError(f"folio_order has values from {array.min()} to {array.max()}: folio orders are 0 to 127")
    # A page in no folio, or in an unknown one, counts as a base page.
    orders: NDArray[np.int8] = np.maximum(array, 0).astype(np.int8, copy=False)
    return orders


def _as_array(plane: ArrayLike, name: str) -> NDArray[Any]:
    """Return the plane as a C-contiguous array of bool or integers."""
    try:
        # Contiguous, because words and bytes of it are read through views of other types.
        array = np.ascontiguousarray(plane) if np.ndim(plane) else np.asarray(plane)
    except ValueError:
        raise UsageError(f"{name} is ragged: all its rows must have the same length") from None
    if array.dtype.kind not in "biu":
        raise UsageError(f"{name} has dtype {array.dtype}: it must be bool or an integer")
    return array


def planes_of(
    columns: PteColumns,
    geometry: Geometry,
    *,
    uffd_armed: NDArray[np.bool_] | None = None,
    droppable: NDArray[np.bool_] | None = None,
) -> Planes:
    """Return the planes of whole PMD ranges, from the columns that were read of an address space.

    Args:
        columns: entries of segments that consist of whole PMD ranges.
        uffd_armed, droppable: bool, shape (ranges,): properties of each range's mapping.
    """
    state = columns.state.reshape(-1, geometry.ptes_per_pmd)
    order = columns.folio_order.reshape(state.shape)
    # Most memory has few kinds of PTEs. A bit that no entry has becomes no plane, and costs nothing in the walk.
    seen = Pte(int(np.bitwise_or.reduce(state, axis=None)))

    def plane(bit: Pte) -> NDArray[np.bool_] | None:
        return (state & np.uint16(bit)) != 0 if bit in seen else None

    return Planes(
        present=(state & np.uint16(Pte.PRESENT)) != 0,
        zero=plane(Pte.ZERO),
        swap=plane(Pte.SWAP),
        guard=plane(Pte.GUARD),
        shared=plane(Pte.SHARED),
        lazyfree=plane(Pte.LAZYFREE),
        uffd=plane(Pte.UFFD_WP),
        unreferenced=plane(Pte.UNREFERENCED),
        folio_order=np.maximum(order, 0) if bool((order > 0).any()) else None,
        pmd_mapped=(state[:, 0] & np.uint16(Pte.PMD_MAPPED)) != 0 if Pte.PMD_MAPPED in seen else None,
        uffd_armed=uffd_armed if uffd_armed is not None and uffd_armed.any() else None,
        droppable=droppable if droppable is not None and droppable.any() else None,
    )


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
