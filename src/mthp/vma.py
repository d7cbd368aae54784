"""One mapping of an address space (struct vm_area_struct)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import ClassVar

from mthp.geometry import MIN_ANON_ORDER, Geometry
from mthp.ptes import Segment


class VmaKind(enum.StrEnum):
    """The kind of memory of a mapping."""

    ANON = "anon"
    """Private memory without a file."""
    FILE = "file"
    """A file, shared or private."""
    SHMEM = "shmem"
    """Shared memory: tmpfs, memfd, System V, or a shared anonymous mapping."""
    HUGETLB = "hugetlb"
    SPECIAL = "special"
    """Memory of a driver or of the kernel itself: vdso, device memory."""


@dataclass(frozen=True, slots=True)
class Vma:
    """One mapping.

    Attributes:
        start, end: half-open range of addresses in bytes.
        permissions: text of ``/proc/PID/maps``, such as ``"rw-p"``.
        name: the path or the bracketed name of ``/proc/PID/maps``, or ``""``.
        kind: the kind of memory.
        flags: two-letter words of the VmFlags line of smaps (Documentation/filesystems/proc.rst); empty if not
            readable.
        has_anon_vma: whether anything was ever written here; None if unknown.
        node_pages: pages by NUMA node; empty if not requested or unknown.
        offset: start in its file, in bytes; 0 without a file.
    """

    JSON: ClassVar = "start:hex end:hex permissions name kind flags pages_by_node"

    start: int
    end: int
    permissions: str
    name: str = ""
    kind: VmaKind = VmaKind.ANON
    flags: frozenset[str] = frozenset()
    has_anon_vma: bool | None = None
    node_pages: tuple[tuple[int, int], ...] = ()
    offset: int = 0

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    @property
    def pages_by_node(self) -> dict[int, int]:
        """`node_pages` as a dictionary."""
        return dict(self.node_pages)

    @property
    def uffd_armed(self) -> bool:
        """Whether it is registered with userfaultfd, in any mode (userfaultfd_armed(), linux/userfaultfd_k.h)."""
        return not self.flags.isdisjoint(("um", "uw", "ui"))

    @property
    def droppable(self) -> bool:
        """Whether the kernel may drop its pages at any time (VM_DROPPABLE)."""
        return "dp" in self.flags

    def pmd_ranges(self, geometry: Geometry) -> Segment:
        """Return the whole PMD ranges of the mapping as (start, end); empty (start == end) without any."""
        start = -(-self.start // geometry.pmd_size) * geometry.pmd_size
        return start, max(start, self.end // geometry.pmd_size * geometry.pmd_size)

    def parts(self, geometry: Geometry, within: Segment | None = None) -> list[Segment]:
        """Return the parts of PMD ranges at its edges that can hold a folio, or all of it if it has no whole range.

        Args:
            within: the range of addresses to which the mapping is cut.
        """
        page, size, smallest = geometry.page_size, geometry.pmd_size, geometry.size_of(MIN_ANON_ORDER)
        start, end = self.start, self.end
        if within is not None:
            start, end = max(start, -(-within[0] // page) * page), min(end, within[1] // page * page)
        first, last = -(-start // size) * size, end // size * size
        parts = [(start, first), (last, end)] if first <= last else [(start, end)]
        return [(low, high) for low, high in parts if -(-low // smallest) * smallest + smallest <= high]
