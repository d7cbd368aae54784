"""Free memory of a machine as the kernel reports it: by order, beyond its reserve, and in blocks that can be emptied.

Linux and the simulated machine print the same texts: ``/proc/buddyinfo``, ``/proc/zoneinfo`` and
``/proc/pagetypeinfo``. Only root can read the last one on Linux.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace


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
        movable: free pages in page blocks of the migrate type Movable, which compaction empties and moves pages to;
            None if unknown.
        used: pages in use in such page blocks.
        listed: pages on the LRU lists: the memory of programs and files.
    """

    blocks: tuple[int, ...]
    kept: int
    movable: int | None
    used: int = 0
    listed: int = 0

    @property
    def spare(self) -> int:
        """Free pages beyond what is kept."""
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
        """Free pages beyond what the kernel keeps."""
        return sum(zone.spare for zone in self.zones)

    @property
    def known_types(self) -> bool:
        """Whether the place of movable memory is known."""
        return any(zone.movable is not None for zone in self.zones)

    def packed(self, sure: int = 0) -> float:
        """Return the share of the memory of programs that lies in page blocks of movable memory.

        Args:
            sure: pages that certainly lie there, and do not count.
        """
        used, listed = (sum(getattr(zone, name) for zone in self.zones) - sure for name in ("used", "listed"))
        return min(1.0, max(0.0, used / listed)) if listed > 0 else 1.0

    def folios(self, order: int) -> int:
        """Return the number of free folios of `order`, in zones that have one beyond what is kept."""
        return sum(_folios(zone.blocks, order) for zone in self.zones if zone.spare >> order)

    def compactable(self, order: int) -> int:
        """Return the free pages that compaction can make folios of `order` of.

        A zone is compacted only if it has two such folios free beyond what is kept (compact_gap(),
        include/linux/compaction.h).
        """
        return sum(zone.movable or 0 for zone in self.zones if zone.spare >= 2 << order)

    def plus(self, pages: int) -> FreeMemory:
        """Return the free memory after programs free some more single pages."""
        # Their zone is unknown, and most likely the one with most of such memory.
        most = max(self.zones, key=lambda zone: zone.used, default=None)
        more = [
            replace(zone, kept=zone.kept - pages, movable=(zone.movable or 0) + pages) if zone is most else zone
            for zone in self.zones
        ]
        return FreeMemory(tuple(more))


def parse_buddyinfo(text: str) -> tuple[FreeBlocks, ...]:
    """Return the nodes in a text of ``/proc/buddyinfo``, ascending."""
    nodes: dict[int, list[int]] = {}
    for (node, _), counts in _free_blocks(text).items():
        blocks = nodes.setdefault(node, [0] * len(counts))
        for order, count in enumerate(counts):
            blocks[order] += count
    return tuple(FreeBlocks(node, tuple(blocks)) for node, blocks in sorted(nodes.items()))


def parse_free_memory(buddyinfo: str, zoneinfo: str, pagetypeinfo: str = "") -> FreeMemory:
    """Return the free memory in these texts.

    Args:
        buddyinfo, zoneinfo, pagetypeinfo: texts of the files of ``/proc``; the last is empty if it cannot be read.
    """
    details = dict(_zone_details(zoneinfo))
    types = dict(_types(pagetypeinfo))
    zones = []
    for name, blocks in _free_blocks(buddyinfo).items():
        kept, listed = details.get(name, (0, 0))
        movable, used = None, 0
        if name in types:
            pages, elsewhere = types[name]
            movable = max(0, _pages(blocks) - elsewhere)
            used = max(0, pages - movable)
        zones.append(FreeZone(tuple(blocks), kept, movable, used, listed))
    return FreeMemory(tuple(zones))


_Zone = tuple[int, str]
"""Number of the zone's node, and name of the zone."""

_ZONE = re.compile(r"Node\s+(\d+), zone\s+(\w+)(?:, type\s+(\w+))?\s*((?:>?\d+\s*)*)")


def _free_blocks(text: str) -> dict[_Zone, list[int]]:
    # Node 0, zone   Normal      1   2578 ...
    return {(node, zone): counts for node, zone, _, counts in _rows(text) if counts}


def _rows(text: str) -> Iterator[tuple[int, str, str, list[int]]]:
    """Yield node, zone, migrate type and numbers of each line of a zone."""
    for line in text.splitlines():
        if match := _ZONE.fullmatch(line.strip()):
            # The kernel stops counting a list of a type at 100 000 blocks, and prints ">100000".
            numbers = [int(word.lstrip(">")) for word in match[4].split()]
            yield int(match[1]), match[2], match[3] or "", numbers


def _zone_details(text: str) -> Iterator[tuple[_Zone, tuple[int, int]]]:
    """Yield for each zone the pages that it keeps free, and its pages on the LRU lists."""
    for part in re.split(r"(?m)^(?=Node)", text):
        head = _ZONE.match(part)
        # The first "min" and the "protection" are of the zone. Further down are those of its lists for processors.
        least, protection = re.search(r"\bmin\s+(\d+)", part), re.search(r"protection: \(([^)]*)\)", part)
        if head is None or least is None:
            continue
        reserve = max(map(int, re.findall(r"\d+", protection[1])), default=0) if protection else 0
        lists = re.findall(r"nr_zone_(?:in)?active_(?:anon|file)\s+(\d+)|nr_zone_unevictable\s+(\d+)", part)
        on_lists = sum(int(either or other) for either, other in lists)
        yield (int(head[1]), head[2]), (int(least[1]) + reserve, on_lists)


def _types(text: str) -> Iterator[tuple[_Zone, tuple[int, int]]]:
    """Yield for each zone the pages of its movable page blocks, and the free pages of the other types.

    Movable lists are the long ones, which the kernel does not count to their end (pagetypeinfo_showfree_print(),
    mm/vmstat.c).
    """
    order = re.search(r"Page block order:\s*(\d+)", text)
    free_text, _, blocks_text = text.partition("Number of blocks type")
    names, _, counts_text = blocks_text.partition("\n")
    if order is None or "Movable" not in names.split():
        return
    column = names.split().index("Movable")
    elsewhere: Counter[_Zone] = Counter()
    for node, zone, kind, counts in _rows(free_text):
        elsewhere[node, zone] += _pages(counts) if kind != "Movable" else 0
    for node, zone, _, counts in _rows(counts_text):
        if len(counts) > column:
            yield (node, zone), (counts[column] << int(order[1]), elsewhere[node, zone])


def _pages(blocks: Sequence[int]) -> int:
    return sum(count << order for order, count in enumerate(blocks))


def _folios(blocks: Sequence[int], order: int) -> int:
    return sum(count << larger - order for larger, count in enumerate(blocks) if larger >= order)
