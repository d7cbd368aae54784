"""The seam: what the engine needs of an address space, whatever stands behind it.

Behind it stand a live Linux process (:mod:`mthp.linux`), a recorded snapshot (:mod:`mthp.snapshot`) and a simulated
machine (:mod:`mthp.sim`). An :class:`AddressSpace` lists its mappings as :class:`Vma`, gives its page table entries
as :class:`PteColumns`, and collapses. Reading is done in blocks of segments, so that memory use stays bounded
however large the target is; a segment is a half-open pair of page-aligned addresses.

A live address space changes while it is read. What is unmapped in between reads as nothing mapped; a process that
exits raises :class:`~mthp.errors.TargetVanishedError`; a collapse that fails is a
:class:`~mthp.results.ScanResult`.
"""

from __future__ import annotations

import abc
import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from mthp.budget import Amount, MemoryBound
from mthp.closing import Closing
from mthp.errors import UnsupportedError
from mthp.geometry import Geometry
from mthp.outline import HUGE, PRESENT, SWAP, ZERO, Outline, outline_of
from mthp.results import ScanResult
from mthp.segments import in_blocks, in_range_blocks
from mthp.tunables import Switches, Tunables

Segment = tuple[int, int]
"""A half-open, page-aligned range of addresses: (start, end)."""

Block = tuple[int, int]
"""An aligned run of memory: its address, and the order of the folio that it is to become."""

Mechanism = Literal["auto", "madvise", "move", "madvise,move", "khugepaged"]
"""How pages are collapsed: by MADV_COLLAPSE, by the mover, by each where it fits the order, or by the kernel's own
khugepaged. ``auto`` is whatever the kernel does by itself: the mover injects code, so it must be asked for by name."""

WATCH_BLOCK = 256 << 20
"""Bytes of address space that a watch reads at a time."""

ORDER_NONE = -1
"""In `PteColumns.folio_order`: no folio is mapped here."""

ORDER_UNKNOWN = -2
"""In `PteColumns.folio_order`: a folio is mapped, but its order cannot be seen with these rights."""


class Pte(enum.IntFlag):
    """Bits of `PteColumns.state`, a uint16 per PTE. A none PTE is 0."""

    PRESENT = 1 << 0
    """Maps a page, the zero page included."""
    ZERO = 1 << 1
    """Maps the shared zero page."""
    SWAP = 1 << 2
    """Not present and not none: a swap entry, or a marker that the kernel counts as one."""
    SHARED = 1 << 3
    """The folio is mapped by another process too, or more than once."""
    LAZYFREE = 1 << 4
    """Freed with MADV_FREE, and clean."""
    UFFD_WP = 1 << 5
    """Write-protected by userfaultfd, as a page, a swap entry or a marker."""
    FILE = 1 << 6
    """Maps a page of a file or of shared memory."""
    PMD_MAPPED = 1 << 7
    """Mapped by a PMD entry, not by a PTE of its own."""
    UNREFERENCED = 1 << 8
    """Known not to have been used recently. Where the kernel does not tell, the bit is clear."""
    GUARD = 1 << 9
    """A guard marker (MADV_GUARD_INSTALL); SWAP is set with it."""
    HUGETLB = 1 << 10
    """Part of a hugetlbfs page, which collapse leaves alone."""


class VmaKind(enum.StrEnum):
    """What a mapping is made of."""

    ANON = "anon"
    """Private memory without a file."""
    FILE = "file"
    """A file, shared or private."""
    SHMEM = "shmem"
    """Shared memory: tmpfs, memfd, System V, or a shared anonymous mapping."""
    HUGETLB = "hugetlb"
    SPECIAL = "special"
    """Made by a driver or by the kernel itself: vdso, device memory."""


@dataclass(frozen=True, slots=True)
class Vma:
    """One mapping.

    Attributes:
        start, end: half-open range of addresses in bytes.
        permissions: such as ``"rw-p"``.
        name: the path or the bracketed name of ``/proc/PID/maps``, or ``""``.
        kind: what it is made of.
        flags: two-letter words of the VmFlags line of smaps (Documentation/filesystems/proc.rst); empty if they
            cannot be read.
        has_anon_vma: whether something was ever written here; None if that cannot be told.
        node_pages: pages by NUMA node; empty if not asked for or not known.
        offset: where in its file it begins, in bytes; 0 without a file.
    """

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
        """Bytes."""
        return self.end - self.start

    @property
    def uffd_armed(self) -> bool:
        """Whether it is registered with userfaultfd, in any of its modes (userfaultfd_armed(), userfaultfd_k.h)."""
        return not self.flags.isdisjoint(("um", "uw", "ui"))

    @property
    def droppable(self) -> bool:
        """Whether the kernel may drop its pages at any time (VM_DROPPABLE)."""
        return "dp" in self.flags

    def pmd_ranges(self, geometry: Geometry) -> Segment:
        """The part that whole PMD ranges make up, (start, end); empty (start == end) if there is none."""
        start = -(-self.start // geometry.pmd_size) * geometry.pmd_size
        return start, max(start, self.end // geometry.pmd_size * geometry.pmd_size)


@dataclass(frozen=True, slots=True)
class PteColumns:
    """Page table entries of some segments, one after another, as columns.

    Attributes:
        segments: what was read, in order.
        state: uint16, shape (pages,): bits of :class:`Pte`.
        folio_order: int8, shape (pages,): order of the folio that the page lies in (0 for a base page),
            ``ORDER_NONE`` or ``ORDER_UNKNOWN``.
        pfn: uint64, shape (pages,): page frame numbers, 0 where not present; None if they cannot be seen.
    """

    segments: tuple[Segment, ...]
    state: NDArray[np.uint16]
    folio_order: NDArray[np.int8]
    pfn: NDArray[np.uint64] | None = None

    def has(self, bits: Pte) -> NDArray[np.bool_]:
        """Which entries have at least one of `bits`: bool, shape (pages,)."""
        chosen: NDArray[np.bool_] = (self.state & np.uint16(bits)) != 0
        return chosen


@dataclass(frozen=True, slots=True)
class CollapseOutcome:
    """What one call of :meth:`AddressSpace.collapse` did.

    Attributes:
        result: SUCCEED, or why not.
        elapsed_ns: time that the call took, in nanoseconds.
        errno: the system's error number where there was one, else 0.
        reason: why not, for a person, where there is more to say than the result's meaning.
        everywhere: whether this holds for the whole address space at this moment, so that other runs would fare no
            better.
        passing: whether it may be otherwise a moment later, so that another try is worth it.
    """

    result: ScanResult
    elapsed_ns: int
    errno: int = 0
    reason: str = ""
    everywhere: bool = False
    passing: bool = False


MAX_PAUSE_NS = 1_000_000
DUTY = 0.2
"""How long a target stands still at a time by default, and for what part of the time: a busy server keeps most of its
throughput (bench/bench_redis.py)."""


@dataclass(frozen=True, slots=True)
class Means:
    """By what means blocks are collapsed, and what that may cost the target.

    Attributes:
        mechanism: what collapses them; see :data:`Mechanism`.
        max_pause_ns: how long the target's threads may stand still in one window of the mover, in nanoseconds.
        duty: the part of the time that they may stand still, above 0, up to 1.
        fill: whether the mover may fill holes; the kernel's call always does.
        verify: compare a hash of the bytes of every moved block before and after, inside the window.
        reserve: memory that must stay free below every limit of the target; None for the default.
        max_threads: refuse to move memory of a target with more threads; None for what `max_pause_ns` allows.
    """

    mechanism: Mechanism = "auto"
    max_pause_ns: int = MAX_PAUSE_NS
    duty: float = DUTY
    fill: bool = False
    verify: bool = False
    reserve: Amount | None = None
    max_threads: int | None = None


USUAL_MEANS = Means()
"""What holds where a caller says nothing."""


class Watch(Protocol):
    """Reads an address space again and again, and leaves out what it knows not to have changed."""

    def look(self, segments: Sequence[Segment]) -> Iterator[PteColumns]:
        """The entries of those PMD ranges in which anything may have changed since the last look.

        Every part of `segments` that lies in such a PMD range is there, by ascending address.

        Args:
            segments: what to look at, by ascending address.

        Raises:
            TargetVanishedError: the process is gone.
        """
        ...


class AddressSpace(Closing, abc.ABC):
    """One address space and the machine around it. A context manager: leaving it lets go of the target.

    One thread may list the mappings while another reads.
    """

    @property
    @abc.abstractmethod
    def geometry(self) -> Geometry:
        """The geometry of the machine."""

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """How to name it to a person, such as ``"1234 (redis-server)"``."""

    @property
    @abc.abstractmethod
    def kernel(self) -> str:
        """The kernel's release, such as ``"6.18.44"``."""

    @property
    @abc.abstractmethod
    def switches(self) -> Switches:
        """The machine's switches at this moment."""

    @property
    @abc.abstractmethod
    def tunables(self) -> Tunables:
        """khugepaged's tunables at this moment."""

    @property
    @abc.abstractmethod
    def thp_disabled(self) -> bool:
        """Whether the process switched THP off for itself (PR_SET_THP_DISABLE)."""

    @property
    @abc.abstractmethod
    def missing(self) -> tuple[str, ...]:
        """What cannot be seen with these rights, each as a sentence that says what would make it visible."""

    @abc.abstractmethod
    def vmas(self) -> list[Vma]:
        """The mappings, by ascending address.

        Raises:
            TargetVanishedError: the process is gone.
        """

    def with_nodes(self, vmas: Sequence[Vma]) -> list[Vma]:
        """`vmas` with their `node_pages`, where the machine tells; finding out takes about as long as listing them.

        Raises:
            TargetVanishedError: the process is gone.
        """
        return list(vmas)

    @abc.abstractmethod
    def read(self, segments: Sequence[Segment]) -> PteColumns:
        """The page table entries of `segments`, one after another.

        Raises:
            TargetVanishedError: the process is gone.
        """

    def zero_filled(self, columns: PteColumns) -> NDArray[np.bool_]:
        """Which of the present pages of `columns`, just read, hold nothing but zeroes: bool, shape (pages,).

        The only question about contents. A page that went away meanwhile counts as one that does not.

        Raises:
            TargetVanishedError: the process is gone.
            UnsupportedError: this backend knows no contents.
            NotPermittedError: these rights do not suffice.
        """
        raise UnsupportedError(
            f"{self.label} has no contents, so it cannot tell pages of nothing but zeroes",
            help="ask it of the running process",
        )

    @abc.abstractmethod
    def collapse(self, address: int, order: int) -> CollapseOutcome:
        """Collapse the aligned run at `address` to one folio of `order`.

        Raises:
            TargetVanishedError: the process is gone.
            UnsupportedError: this backend cannot, at all or at this order.
            NotPermittedError: these rights do not suffice.
        """

    def collapse_blocks(self, blocks: Sequence[Block], means: Means) -> list[CollapseOutcome]:
        """Collapse disjoint `blocks`, as many at a time as `means` allows: the outcome of each, in their order.

        Raises:
            As :meth:`collapse`.
        """
        return [self.collapse(address, order) for address, order in blocks]

    def mechanism_for(self, order: int, asked: Mechanism) -> Mechanism | None:
        """Return what makes a folio of `order` if the mechanism `asked` is chosen; None if nothing does."""
        if asked == "khugepaged":
            return asked
        if order == self.geometry.pmd_order:
            return None if asked == "move" else "madvise"
        return "move" if "move" in asked else None

    def drives_khugepaged(self, order: int) -> bool:
        """Return whether the machine's own khugepaged makes folios of `order`, and may be driven with these rights."""
        return False

    def take_pauses(self) -> list[int]:
        """How long the target's threads stood still, in nanoseconds, for every window since this was last asked."""
        return []

    def threads(self) -> int:
        """Return how many threads run in this address space.

        Raises:
            TargetVanishedError: the process is gone.
        """
        return 1

    def resident_bytes(self) -> int:
        """Return how many bytes of the process are in memory.

        Raises:
            TargetVanishedError: the process is gone.
        """
        pages = 0
        mapped = self.populated(self.mapped(), self.geometry.pmd_size)
        for block in in_blocks(mapped, WATCH_BLOCK):
            columns = self.read(block)
            pages += int((columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO)).sum())
        return pages * self.geometry.page_size

    def memory_bounds(self) -> list[MemoryBound]:
        """Return the limits that new memory of the process counts against, as they are at this moment.

        Raises:
            TargetVanishedError: the process is gone.
        """
        return []

    def move_hindrances(self, means: Means) -> list[str]:
        """Return all that speaks against moving memory by `means` at this moment, each as a sentence.

        Raises:
            TargetVanishedError: the process is gone.
        """
        return []

    def free_bytes(self, order: int) -> int | None:
        """Return the bytes that the machine can make folios of `order` of at once.

        None where that cannot be seen.

        Raises:
            TargetVanishedError: the process is gone.
        """
        return None

    def watch(self) -> Watch:
        """Something that reads the page table entries again and again, as cheaply as the backend can.

        By default it gives everything every time.
        """
        return _Reading(self)

    def counters(self) -> dict[str, int]:
        """What the machine counts at this moment of the target (``minflt``, ``majflt``) and of folios, by name.

        Counters of folio sizes are called as below sysfs: ``hugepages-64kB/anon_fault_alloc``. A machine that counts
        nothing gives none.

        Raises:
            TargetVanishedError: the process is gone.
        """
        return {}

    def mapped(self) -> list[Segment]:
        """The ranges of all mappings, by ascending address: :meth:`vmas` without what costs time to find out.

        Raises:
            TargetVanishedError: the process is gone.
        """
        return [(vma.start, vma.end) for vma in self.vmas()]

    def populated(self, segments: Sequence[Segment], granule: int) -> list[Segment]:
        """The parts of `segments` that may hold something, in whole granules of `granule` bytes.

        What is left out reads as none throughout. A backend that cannot tell cheaply gives `segments` back.
        """
        return list(segments)

    def outline(self, segments: Sequence[Segment]) -> Outline:
        """What the PMD ranges of `segments`, which are whole and ascend, hold, without looking at their folios.

        A backend that cannot tell cheaply reads everything.

        Raises:
            TargetVanishedError: the process is gone.
        """
        parts = [
            _outline_of_block(self.read(block), self.geometry)
            for block in in_blocks(segments, _OUTLINE_PMD_RANGES * self.geometry.pmd_size)
        ]
        return Outline.joined(parts)

    def close(self) -> None:
        """Let go of the target."""
        return


class _Reading:
    """The :class:`Watch` of a backend that has no better one."""

    def __init__(self, space: AddressSpace) -> None:
        self._space = space

    def look(self, segments: Sequence[Segment]) -> Iterator[PteColumns]:
        """Everything."""
        for block in in_range_blocks(segments, self._space.geometry, WATCH_BLOCK):
            yield self._space.read(block)


_OUTLINE_PMD_RANGES = 128
"""PMD ranges that are read at a time for an outline."""


def _outline_of_block(columns: PteColumns, geometry: Geometry) -> Outline:
    """The outline of what was read: runs of pages that are alike."""
    kinds = np.zeros(len(columns.state), np.uint8)
    for kind, bit in ((PRESENT, Pte.PRESENT), (HUGE, Pte.PMD_MAPPED), (ZERO, Pte.ZERO), (SWAP, Pte.SWAP)):
        kinds[columns.has(bit)] |= kind
    pages = [(end - start) // geometry.page_size for start, end in columns.segments]
    starts = np.array([start for start, _ in columns.segments], np.uint64)
    first = np.cumsum(pages) - pages
    heads = np.unique(np.r_[np.flatnonzero(np.r_[True, kinds[1:] != kinds[:-1]]) if len(kinds) else [], first])
    heads = heads.astype(np.int64)
    stops = np.r_[heads[1:], len(kinds)]
    segment = np.searchsorted(first, heads, side="right") - 1
    begin = starts[segment] + ((heads - first[segment]) * geometry.page_size).astype(np.uint64)
    end = begin + ((stops - heads) * geometry.page_size).astype(np.uint64)
    there = kinds[heads] != 0
    return outline_of(begin[there], end[there], kinds[heads][there], geometry)
