"""Page size and PMD order, and the conversion between orders, bytes and "64K".

A folio of *order* k is 2**k base pages, naturally aligned. The *PMD order* is the order that one entry of the
second-lowest page table level maps; a *PMD range* is one aligned run of ``2**pmd_order`` pages. Both differ between
architectures, so everything in this package takes them from a :class:`Geometry`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from mthp.errors import UsageError
from mthp.units import format_size, parse_order_or_size

MIN_ANON_ORDER = 2
"""The smallest order above 0 of anonymous memory (THP_ORDERS_ALL_ANON, include/linux/huge_mm.h)."""

MAX_PMD_ORDER = 15
"""The largest PMD order that this package supports; the largest of any architecture is 13."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """The division of memory on one kind of machine.

    Attributes:
        name: name, such as ``"x86-64"``.
        page_size: bytes in a base page.
        pmd_order: order of the folio that one PMD entry maps.
    """

    JSON: ClassVar = "name page_size pmd_order pmd_size"

    name: str
    page_size: int
    pmd_order: int

    def __post_init__(self) -> None:
        if self.page_size < 512 or self.page_size & (self.page_size - 1):
            raise UsageError(f"page size {self.page_size} is not a power of two of at least 512 bytes")
        if not MIN_ANON_ORDER <= self.pmd_order <= MAX_PMD_ORDER:
            raise UsageError(f"PMD order {self.pmd_order} is not within {MIN_ANON_ORDER} to {MAX_PMD_ORDER}")

    @property
    def ptes_per_pmd(self) -> int:
        """PTEs, and so base pages, in one PMD range."""
        return 1 << self.pmd_order

    @property
    def pmd_size(self) -> int:
        """Bytes in one PMD range."""
        return self.page_size << self.pmd_order

    @property
    def anon_orders(self) -> tuple[int, ...]:
        """Every order above 0 that anonymous memory can be mapped with, smallest first."""
        return tuple(range(MIN_ANON_ORDER, self.pmd_order + 1))

    def size_of(self, order: int) -> int:
        """Return the bytes in a folio of `order`."""
        return self.page_size << order

    def label(self, order: int) -> str:
        """Return the size of a folio of `order` as text, such as ``"64K"``."""
        return format_size(self.size_of(order))

    def sysfs_name(self, order: int) -> str:
        """Return the name of the order's directory in sysfs, such as ``"hugepages-64kB"``."""
        return f"hugepages-{self.size_of(order) >> 10}kB"

    def parse_order(self, text: str | int) -> int:
        """Return the order of one folio size, written ``64K``, ``64kB``, ``65536`` or ``order=4``.

        Args:
            text: the size; an int is an order.

        Raises:
            UsageError: `text` is not a size, or not one of anonymous folios of this geometry.
        """
        if not isinstance(text, str):
            return self.check_order(text)
        named, size = parse_order_or_size(text)
        if named is not None:
            return self.check_order(named)
        assert size is not None
        order = (size // self.page_size).bit_length() - 1
        if order not in self.anon_orders or self.size_of(order) != size:
            raise UsageError(f"{text!r} is not a folio size on {self.name}", help=self._allowed())
        return order

    def check_order(self, order: int) -> int:
        """Return `order` as an int, if anonymous folios can have it.

        Raises:
            UsageError: `order` is below 2, above the PMD order, or not an integer.
        """
        try:
            order = operator.index(order)
        except TypeError:
            raise UsageError(f"order {order!r} is not an integer", help=self._allowed()) from None
        if not MIN_ANON_ORDER <= order <= self.pmd_order:
            raise UsageError(f"order {order} does not exist on {self.name}", help=self._allowed())
        return order

    def parse_orders(self, text: str | Iterable[str | int]) -> tuple[int, ...]:
        """Return the orders of a list of sizes: ``"16K,64K,2M"``, ``"order=2,order=9"``, ``"all"``, or an iterable.

        Returns:
            The orders, ascending, each once.

        Raises:
            UsageError: the list is empty, or has an entry that is not a folio size.
        """
        if isinstance(text, str):
            if text.strip().lower() == "all":
                return self.anon_orders
            text = [part for part in text.split(",") if part.strip()]
        orders = tuple(sorted({self.parse_order(part) for part in text}))
        if not orders:
            raise UsageError("no order was given", help=self._allowed())
        return orders

    def _allowed(self) -> str:
        return (
            f"use {', '.join(self.label(order) for order in self.anon_orders)}"
            f" (order={MIN_ANON_ORDER} to order={self.pmd_order})"
        )


_K = 1 << 10
GEOMETRIES: dict[str, Geometry] = {
    geometry.name: geometry
    for geometry in (
        Geometry("x86-64", 4 * _K, 9),
        Geometry("arm64-4k", 4 * _K, 9),
        Geometry("riscv64", 4 * _K, 9),
        Geometry("arm64-16k", 16 * _K, 11),
        Geometry("arm64-64k", 64 * _K, 13),
        Geometry("ppc64-64k", 64 * _K, 5),
        Geometry("ppc64-4k", 4 * _K, 9),
        Geometry("s390x", 4 * _K, 8),
    )
}
"""The geometries of the kernels that have THP, by name."""

X86_64 = GEOMETRIES["x86-64"]


def geometry_named(name: str) -> Geometry:
    """Return the preset called `name`.

    Raises:
        UsageError: no preset has that name.
    """
    try:
        return GEOMETRIES[name]
    except KeyError:
        raise UsageError(f"unknown geometry {name!r}", help=f"use {', '.join(GEOMETRIES)}") from None


def geometry_for_ptes(ptes_per_pmd: int) -> Geometry:
    """Return a geometry with that number of PTEs per PMD range: the first such preset, else one of 4 KiB pages.

    Raises:
        UsageError: the number is not a power of two from 4 to 32 768.
    """
    for geometry in GEOMETRIES.values():
        if geometry.ptes_per_pmd == ptes_per_pmd:
            return geometry
    if ptes_per_pmd & (ptes_per_pmd - 1) or not 1 << MIN_ANON_ORDER <= ptes_per_pmd <= 1 << MAX_PMD_ORDER:
        raise UsageError(f"{ptes_per_pmd} PTEs per PMD range: it must be a power of two from 4 to {1 << MAX_PMD_ORDER}")
    return Geometry(f"{ptes_per_pmd}-ptes", 4 * _K, ptes_per_pmd.bit_length() - 1)
