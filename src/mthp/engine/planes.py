"""The contents of PMD ranges, as planes of bits over their PTEs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mthp.engine.bits import PART_ORDER, Bits
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
    def checked(cls, present: ArrayLike, others: Mapping[str, Any]) -> Planes:
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


class PlaneArrays(TypedDict, total=False):
    """The planes that a caller may have beside `present`, as arrays or nested lists; :class:`Planes` defines each."""

    zero: ArrayLike | None
    swap: ArrayLike | None
    guard: ArrayLike | None
    shared: ArrayLike | None
    lazyfree: ArrayLike | None
    uffd: ArrayLike | None
    unreferenced: ArrayLike | None
    folio_order: ArrayLike | None
    filled: ArrayLike | None
    pmd_mapped: ArrayLike | None
    uffd_armed: ArrayLike | None
    droppable: ArrayLike | None


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
