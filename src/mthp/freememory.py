"""Free memory of a machine as the kernel reports it: by order, beyond its reserve, and block by block.

Linux and the simulated machine print the same texts: ``/proc/buddyinfo`` and ``/proc/zoneinfo``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class FreeBlocks:
    """Free memory of one NUMA node, as ``/proc/buddyinfo`` counts it (proc_buddyinfo(5)).

    The buddy allocator keeps it in aligned blocks of 2**order pages. A block of its order or a larger one supplies a
    folio at once; otherwise the kernel compacts or reclaims first, and the collapse stalls. The counts are an upper
    bound: watermarks, and zones kept for devices, withhold some of it.

    Attributes:
        node: its number.
        blocks: number of free blocks, by order, all zones together.
    """

    node: int
    blocks: tuple[int, ...]

    @property
    def pages(self) -> int:
        """Number of free base pages."""
        return _pages(self.blocks)

    def folios(self, order: int) -> int:
        """Return the number of folios of `order` that can be allocated at once."""
        return _folios(self.blocks, order)


@dataclass(frozen=True, slots=True)
class FreeZone:
    """Free memory of one zone.

    Attributes:
        blocks: number of free blocks, by order.
        kept: pages that the kernel keeps free: the ``min`` watermark, and the reserve for allocations that can use no
            other zone (__zone_watermark_ok(), mm/page_alloc.c).
        listed: free pages in the lists of processors (struct per_cpu_pages), which are not in `blocks`. The kernel
            drains them before compaction or an allocation fails (__alloc_pages_direct_reclaim(), mm/page_alloc.c).
        unlisted: pages that the lists of one processor take until they are full (nr_pcp_high(), mm/page_alloc.c).
        frames: first frame, and the frame behind the last one.
    """

    blocks: tuple[int, ...]
    kept: int
    listed: int = 0
    unlisted: int = 0
    frames: tuple[int, int] = (0, 0)

    @property
    def spare(self) -> int:
        """Free pages beyond what is kept, without those in lists of processors."""
        return max(0, _pages(self.blocks) - self.kept)


@dataclass(frozen=True, slots=True)
class FreeMemory:
    """Free memory of a machine.

    Attributes:
        zones: the zones that the memory of programs comes from.
    """

    zones: tuple[FreeZone, ...]

    @property
    def spare(self) -> int:
        """Free pages beyond what the kernel keeps, without those in lists of processors."""
        return sum(zone.spare for zone in self.zones)

    @property
    def listed(self) -> int:
        """Free pages in lists of processors."""
        return sum(zone.listed for zone in self.zones)

    @property
    def unlisted(self) -> int:
        """Pages that a process can free into the lists of its processor until they are full."""
        return sum(zone.unlisted for zone in self.zones)

    def folios(self, order: int) -> int:
        """Return the number of free folios of `order`, in zones that have one beyond what is kept."""
        return sum(_folios(zone.blocks, order) for zone in self.zones if zone.spare >> order)

    def plus(self, pages: int) -> FreeMemory:
        """Return the free memory after programs give some more single pages back."""
        # Their zone is unknown, and most likely the largest.
        most = max(self.zones, key=lambda zone: zone.frames[1] - zone.frames[0], default=None)
        return FreeMemory(tuple(replace(zone, kept=zone.kept - pages) if zone is most else zone for zone in self.zones))


FREE, MOVES, STAYS, UNKNOWN = range(4)
"""Kinds of pages: free; moved by compaction; in use for good; in the list of a processor or in use by the kernel, which
is not visible."""

TAIL = -1
"""In place of an order: a page of a folio that is not its first."""


@dataclass(frozen=True, slots=True)
class MemoryBlocks:
    """The memory of a machine, or a sample of it, in aligned blocks, ascending.

    Attributes:
        order: of the blocks.
        numbers: int64, shape (blocks,): first frame >> order.
        zone: int8, shape (blocks,): index in :attr:`FreeMemory.zones`.
        pages: int8, shape (blocks, 1 << order): kind of each page.
        folios: int8, shape (blocks, 1 << order): order of the folio that begins with each page, TAIL for its other
            pages.
        closed: bool, shape (blocks,): compaction moves no pages to it, because its migrate type is not Movable or CMA
            (suitable_migration_target(), mm/compaction.c).
        weight: blocks of the machine that each stands for.
    """

    order: int
    numbers: NDArray[np.int64]
    zone: NDArray[np.int8]
    pages: NDArray[np.int8]
    folios: NDArray[np.int8]
    closed: NDArray[np.bool_]
    weight: int = 1

    def count(self, kind: int) -> NDArray[np.int64]:
        """Return the pages of a kind in each block: int64, shape (blocks,)."""
        counts: NDArray[np.int64] = (self.pages == kind).sum(axis=1, dtype=np.int64)
        return counts

    def at(self, frames: NDArray[np.int64]) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
        """Return the index of each frame in the pages of all blocks, and whether its block is one of these."""
        rows = np.minimum(np.searchsorted(self.numbers, frames >> self.order), max(0, len(self.numbers) - 1))
        known = np.zeros(len(frames), np.bool_)
        if len(self.numbers):
            known = self.numbers[rows] == frames >> self.order
        return (rows << self.order) + (frames & (1 << self.order) - 1), known

    def free_in(self, numbers: NDArray[np.int64], order: int) -> NDArray[np.int64]:
        """Return the free pages in blocks of `order`, at most that of these: int64, shape (numbers,).

        Args:
            numbers: first frame >> order of each; 0 pages are free in blocks outside a sample.
        """
        first, known = self.at(numbers << order)
        free = np.zeros(len(numbers), np.int64)
        free[known] = (self.pages.reshape(-1, 1 << order)[first[known] >> order] == FREE).sum(axis=1)
        return free


def parse_buddyinfo(text: str) -> tuple[FreeBlocks, ...]:
    """Return the nodes in a text of ``/proc/buddyinfo``, ascending."""
    nodes: dict[int, list[int]] = {}
    for (node, _), counts in _free_blocks(text).items():
        blocks = nodes.setdefault(node, [0] * len(counts))
        for order, count in enumerate(counts):
            blocks[order] += count
    return tuple(FreeBlocks(node, tuple(blocks)) for node, blocks in sorted(nodes.items()))


def parse_free_memory(buddyinfo: str, zoneinfo: str) -> FreeMemory:
    """Return the free memory in these texts of the files of ``/proc``."""
    details = dict(_zone_details(zoneinfo))
    unknown = FreeZone((), 0)
    return FreeMemory(
        tuple(
            replace(details.get(name, unknown), blocks=tuple(blocks))
            for name, blocks in _free_blocks(buddyinfo).items()
        )
    )


def parse_closed_blocks(pagetypeinfo: str) -> list[list[list[int]]]:
    """Return the free blocks by order, of each migrate type to which compaction moves nothing.

    Args:
        pagetypeinfo: text of ``/proc/pagetypeinfo``.

    Returns:
        Counts for each zone, in the order of the text, which is that of ``/proc/buddyinfo``, and in it for each type. A
        count that the kernel cut off (``>100000``, pagetypeinfo_showfree_print(), mm/vmstat.c) is the bound.
    """
    zones: dict[tuple[str, str], list[list[int]]] = {}
    for node, zone, kind, numbers in _TYPE.findall(pagetypeinfo):
        types = zones.setdefault((node, zone), [])
        if kind not in _OPEN_TYPES:
            types.append([int(word.lstrip(">")) for word in numbers.split()])
    return list(zones.values())


_TYPE = re.compile(r"(?m)^Node\s+(\d+), zone\s+(\w+), type\s+(\w+)((?:\s+>?\d+)+)\s*$")

_OPEN_TYPES = ("Movable", "CMA")
"""Types of blocks to which compaction moves pages."""

_Zone = tuple[int, str]
"""Number of the zone's node, and name of the zone."""

_ZONE = re.compile(r"Node\s+(\d+), zone\s+(\w+)\s*((?:\d+\s*)*)")


def _free_blocks(text: str) -> dict[_Zone, list[int]]:
    # Node 0, zone   Normal      1   2578 ...
    matches = (_ZONE.fullmatch(line.strip()) for line in text.splitlines())
    return {
        (int(match[1]), match[2]): [int(word) for word in match[3].split()] for match in matches if match and match[3]
    }


def _zone_details(text: str) -> Iterator[tuple[_Zone, FreeZone]]:
    """Yield each zone, without its free blocks."""
    for part in re.split(r"(?m)^(?=Node)", text):
        head = _ZONE.match(part)
        # The first "min" is that of the zone.
        least = re.search(r"\bmin\s+(\d+)", part)
        if head is None or least is None:
            continue
        protection = re.search(r"protection: \(([^)]*)\)", part)
        reserve = max(map(int, re.findall(r"\d+", protection[1])), default=0) if protection else 0
        boost, start, spanned = (
            int(found[1]) if (found := re.search(rf"\b{name}\s+(\d+)", part)) else 0
            for name in ("boost", "start_pfn:", "spanned")
        )
        counts, full, full_older = (
            [int(number) for number in re.findall(rf"\b{name}:\s+(\d+)", part)]
            for name in ("count", "high_min", "high")
        )
        # The boost after a fallback (boost_watermark(), mm/page_alloc.c) passes as soon as kswapd has run. It does not
        # where it found nothing to reclaim (wakeup_kswapd(), mm/vmscan.c).
        cache = sum(map(int, re.findall(r"nr_zone_(?:in)?active_file\s+(\d+)", part)))
        if cache < boost or re.search(r"node_unreclaimable:\s+1", part):
            boost = 0
        yield (
            (int(head[1]), head[2]),
            FreeZone(
                (),
                int(least[1]) - boost + reserve,
                sum(counts),
                # Linux 6.7 and later let the length float above high_min.
                max([0, *(most - count for count, most in zip(counts, full or full_older, strict=False))]),
                (start, start + spanned),
            ),
        )


def _pages(blocks: Sequence[int]) -> int:
    return sum(count << order for order, count in enumerate(blocks))


def _folios(blocks: Sequence[int], order: int) -> int:
    return sum(count << larger - order for larger, count in enumerate(blocks) if larger >= order)
