"""How much memory the machine has for new folios: free blocks by order, and what is available.

Free memory is kept by the buddy allocator in aligned blocks of 2**order pages, which ``/proc/buddyinfo`` counts by
NUMA node and zone (proc_buddyinfo(5)). A folio of some order is had at once from a block of that order or a larger
one; otherwise the kernel must compact or reclaim first, which is what makes a collapse stall. The counts are an upper
bound: watermarks, and zones kept for devices, withhold some of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FreeBlocks:
    """Free memory of one NUMA node.

    Attributes:
        node: its number.
        blocks: number of free blocks, by order, all zones together.
    """

    node: int
    blocks: tuple[int, ...]

    @property
    def pages(self) -> int:
        """Free base pages."""
        return sum(count << order for order, count in enumerate(self.blocks))

    def folios(self, order: int) -> int:
        """How many folios of `order` could be had at once."""
        return sum(count << larger - order for larger, count in enumerate(self.blocks) if larger >= order)


def parse_buddyinfo(text: str) -> tuple[FreeBlocks, ...]:
    """The nodes in a text of ``/proc/buddyinfo``, ascending."""
    nodes: dict[int, list[int]] = {}
    for line in text.splitlines():
        # Node 0, zone   Normal      1   2578 ...
        words = line.split()
        if len(words) < 5 or words[0] != "Node":
            continue
        counts = [int(word) for word in words[4:]]
        blocks = nodes.setdefault(int(words[1].rstrip(",")), [0] * len(counts))
        for order, count in enumerate(counts):
            blocks[order] += count
    return tuple(FreeBlocks(node, tuple(blocks)) for node, blocks in sorted(nodes.items()))


def free_beyond_reserve(order: int, buddyinfo: Path = Path("/proc/buddyinfo")) -> int | None:
    """Return the bytes in free blocks of `order` or larger that the kernel does not hold back.

    Below its high watermark a zone may refuse, which is above min_free_kbytes by half at most by default
    (__setup_per_zone_wmarks, mm/page_alloc.c).

    Returns:
        None if it cannot be seen.
    """
    try:
        nodes = parse_buddyinfo(buddyinfo.read_text())
        reserve = int(Path("/proc/sys/vm/min_free_kbytes").read_text()) << 10
    except (OSError, ValueError):
        return None
    if not nodes:
        return None
    free = sum(node.folios(order) for node in nodes) * (os.sysconf("SC_PAGESIZE") << order)
    return max(0, free - reserve * 3 // 2)


def parse_meminfo(text: str, field: str) -> int | None:
    """One field of ``/proc/meminfo`` in bytes, such as ``"MemAvailable"``; None if it is not there."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) << 10
    return None
