"""Physical memory: one column per property of a frame, and folios over them.

A folio of order k is 2**k frames, aligned to that number, so its first frame, the *head*, follows from any of its
frames and the order noted there. Properties of the whole folio are kept at its head. A page mapped through a PMD entry
counts as if it had a PTE. Sizes are in frames; pfn is a frame number. A frame costs 17 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.errors import UsageError
from mthp.geometry import Geometry
from mthp.sim.counters import Counters
from mthp.sim.frames.buddy import Frames, Zone, runs_of
from mthp.sim.frames.memcg import ROOT, Cgroups

MAX_PAGE_ORDER = 10
"""Order of the allocator's largest block, unless the PMD order is larger (CONFIG_ARCH_FORCE_MAX_ORDER)."""

MANY_MMS = 0x7FFF
"""Stands for the second address space of a large folio if there are more than two."""

LOWMEM_RESERVE_RATIO = 256
"""A lower zone reserves one frame for each of this many frames in the zones above it (sysctl_lowmem_reserve_ratio)."""


ZERO_CONTENT = 0
"""Content of memory that was cleared and not written since."""


class Fl:
    """Bits of the `flags` column, a uint16 per frame; all but ALLOCATED and POISONED are set at the head only.

    Plain numbers, because joining two flags of an enum costs a microsecond.
    """

    ALLOCATED = np.uint16(1 << 0)
    LRU = np.uint16(1 << 1)
    """On an LRU list (PG_lru); clear while isolated or in a CPU's batch."""
    LOCKED = np.uint16(1 << 2)
    REFERENCED = np.uint16(1 << 3)
    ACTIVE = np.uint16(1 << 4)
    ANON = np.uint16(1 << 5)
    SWAPBACKED = np.uint16(1 << 6)
    """Must be written to swap before it is dropped; clear for lazyfree memory."""
    SWAPCACHE = np.uint16(1 << 7)
    DIRTY = np.uint16(1 << 8)
    UPTODATE = np.uint16(1 << 9)
    MLOCKED = np.uint16(1 << 10)
    POISONED = np.uint16(1 << 11)
    PARTIALLY_MAPPED = np.uint16(1 << 12)
    """A large folio on the deferred split list because some pages are not mapped (folio_test_partially_mapped)."""
    YOUNG = np.uint16(1 << 13)
    """Idle tracking's bit (folio_test_young)."""
    OWNED = np.uint16(1 << 14)
    """Held with one reference by a driver, by the kernel itself or by the page cache."""


def _distances(nodes: int, given: Sequence[Sequence[int]] | None) -> NDArray[np.int64]:
    """Return the checked distances of nodes: int64, shape (nodes, nodes)."""
    # LOCAL_DISTANCE and REMOTE_DISTANCE (include/linux/topology.h).
    near = np.where(np.eye(nodes, dtype=np.bool_), 10, 20) if given is None else np.array(given)
    if near.shape != (nodes, nodes) or (near.diagonal() != 10).any() or (near < 10).any():
        raise UsageError(f"node distances {near.tolist()} are not a square of {nodes} with 10 on its diagonal")
    return near.astype(np.int64)


def _zones(node_frames: Sequence[int], low_frames: int, max_order: int) -> list[Zone]:
    """Return the zones of all nodes, in order of address."""
    if not 0 <= low_frames <= node_frames[0]:
        raise UsageError(f"{low_frames} low frames are not a part of the {node_frames[0]} of the first node")
    zones: list[Zone] = []
    block = start = 1 << max_order  # Frame 0 is not used, so that pfn 0 can stand for "no page".
    for node, frames in enumerate(node_frames):
        low = low_frames if node == 0 else 0
        for name, count in (("DMA32", low), ("Normal", frames - low)):
            if count:
                zones.append(Zone(start, -(-count // block) * block, max_order, node, name))
                start = zones[-1].end
    if low_frames and zones[1:] and zones[1].node == 0:
        zones[0].reserve = zones[1].frames // LOWMEM_RESERVE_RATIO
    return zones


class Memory:
    """The frames of all nodes.

    Args:
        node_frames: frames of each node; rounded up to whole blocks of the largest order.
        distances: distance of every node to every node; by default 10 to itself and 20 to the others.
        low_frames: frames of the first node in its zone DMA32, below the others; rounded up likewise.

    Attributes:
        zones: in order of address.
        nodes: number of nodes.
        distances: int64, shape (nodes, nodes).
        deferred: heads of the folios to be split when memory is short, in the order in which they were added.
        cache: frames of the page cache, the oldest first; no address space maps them.
        unmovable: bool, shape (page blocks,): which aligned blocks of the PMD order have the migrate type Unmovable.
    """

    def __init__(
        self,
        geometry: Geometry,
        node_frames: Sequence[int],
        counters: Counters,
        distances: Sequence[Sequence[int]] | None = None,
        low_frames: int = 0,
    ) -> None:
        if not node_frames or min(node_frames) < 1:
            raise UsageError(f"nodes of {list(node_frames)} frames: at least one node with one frame is needed")
        self.distances = _distances(len(node_frames), distances)
        self.geometry = geometry
        # Some machines have a PMD order above the usual largest block, such as arm64 with 64 KiB pages: 13.
        self.max_order = max(MAX_PAGE_ORDER, geometry.pmd_order)
        self.zones = _zones(node_frames, low_frames, self.max_order)
        start = self.zones[-1].end
        self.nodes = len(node_frames)
        self._counters = counters
        self._ends: Frames = np.array([zone.end for zone in self.zones], np.int64)
        self._zonelist = self.zonelist(range(self.nodes))
        self._zone_nodes: NDArray[np.intp] = np.array([zone.node for zone in self.zones], np.intp)
        self.flags: NDArray[np.uint16] = np.zeros(start, np.uint16)
        self.order: NDArray[np.uint8] = np.zeros(start, np.uint8)
        # Tails need no references of their own, and hold properties of a large folio that the kernel keeps in their
        # struct page (struct folio, include/linux/mm_types.h):
        #   head      the folio's references
        #   head + 1  the number of PTEs that map it, in all address spaces together (_large_mapcount)
        #   head + 2  the number of those in the first address space of head + 3 (_mm_id_mapcount[0])
        #   head + 3  the numbers of two address spaces that map it (_mm_ids): the first in the low 16 bits, the second
        #             above; MANY_MMS there means that a third one was not noted
        self.refcount: NDArray[np.int32] = np.zeros(start, np.int32)
        self.mapcount: NDArray[np.int32] = np.zeros(start, np.int32)
        self.content: NDArray[np.uint32] = np.zeros(start, np.uint32)
        self.cgroup: NDArray[np.uint16] = np.zeros(start, np.uint16)
        self.unmovable: NDArray[np.bool_] = np.zeros(start >> geometry.pmd_order, np.bool_)
        self.cgroups = Cgroups()
        self.deferred: dict[int, None] = {}
        self.cache: dict[int, None] = {}

    def nodes_of(self, pfns: Frames) -> NDArray[np.intp]:
        """Return the node of each frame: intp, shape of `pfns`."""
        return self._zone_nodes[np.searchsorted(self._ends, pfns, side="right")]

    def zonelist(self, nodes: Sequence[int] = ()) -> list[Zone]:
        """Return the zones in the order in which they are tried: node by node, the highest zone of each first.

        Args:
            nodes: nodes to try; by default all.
        """
        if not len(nodes):
            return self._zonelist
        return [zone for node in nodes for zone in reversed(self.zones) if zone.node == node]

    def heads(self, pfns: Frames) -> Frames:
        """Return the heads of the folios that frames lie in: int64, shape of `pfns`."""
        sizes: Frames = np.left_shift(np.int64(1), self.order[pfns].astype(np.int64))
        # Folios are naturally aligned: the head follows from the order.
        return pfns & -sizes

    def head(self, pfn: int) -> int:
        """Return the head of the folio that a frame lies in."""
        return pfn & -(1 << int(self.order[pfn]))

    def size(self, head: int) -> int:
        """Return the number of frames of a folio."""
        return 1 << int(self.order[head])

    def has(self, head: int, flag: np.uint16) -> bool:
        """Return whether a folio has a flag."""
        return bool(self.flags[head] & flag)

    def has_lazyfree(self) -> bool:
        """Return whether the LRU lists have an anonymous folio that can be dropped without writing it to swap."""
        wanted = Fl.LRU | Fl.ANON
        return bool(((self.flags & (wanted | Fl.SWAPBACKED)) == wanted).any())

    def set(self, head: int, flag: np.uint16) -> None:
        """Set a flag of a folio."""
        self.flags[head] |= flag

    def clear(self, head: int, flag: np.uint16) -> None:
        """Clear a flag of a folio."""
        self.flags[head] &= ~flag

    @property
    def free_frames(self) -> int:
        """Free frames of all nodes."""
        return sum(zone.free_frames for zone in self.zones)

    def alloc(self, order: int, nodes: Sequence[int] = (), *, low: bool = False) -> int | None:
        """Return a new cleared folio with one reference; None if no node has a block.

        Args:
            low: keep to the ``low`` watermark.
        """
        for zone in self.zonelist(nodes):
            if (head := zone.alloc(order, low=low)) is not None:
                self._prepare(head, order)
                return head
        return None

    def alloc_many(self, order: int, count: int) -> Frames:
        """Allocate cleared folios of one order, each with one reference, down to the ``low`` watermark.

        Returns:
            int64, shape (folios,): their heads; fewer than `count` if memory ran out.
        """
        if not order:
            return self.alloc_small(count, low=True)
        taken: list[int] = []
        for zone in self.zonelist():
            while len(taken) < count and (head := zone.alloc(order, low=True)) is not None:
                taken.append(head)
        heads = np.array(taken, np.int64)
        frames = heads[:, None] + np.arange(1 << order)
        self.flags[frames] = Fl.ALLOCATED
        self.order[frames] = order
        # Also of the tails: theirs hold the mapcounts of the folio.
        self.refcount[frames] = 0
        self.refcount[heads] = 1
        self.mapcount[frames] = 0
        self.content[frames] = ZERO_CONTENT
        self.cgroup[heads] = ROOT
        return heads

    def alloc_small(self, count: int, nodes: Sequence[int] = (), *, low: bool = False) -> Frames:
        """Allocate cleared folios of order 0, each with one reference, contiguous if possible.

        Args:
            low: keep to the ``low`` watermark.

        Returns:
            int64, shape (pages,): their frames; fewer than `count` if memory ran out.
        """
        taken: list[tuple[int, int]] = []
        for zone in self.zonelist(nodes):
            taken += zone.alloc_pages(count - sum(length for _, length in taken), low=low)
        for start, length in taken:
            run = slice(start, start + length)
            self.flags[run] = Fl.ALLOCATED
            self.refcount[run] = 1
            self.mapcount[run] = 0
            self.content[run] = ZERO_CONTENT
            self.cgroup[run] = ROOT
        ranges = [np.arange(start, start + length) for start, length in taken]
        return np.concatenate(ranges) if ranges else np.zeros(0, np.int64)

    def own(self, pfns: Frames, *flags: np.uint16) -> None:
        """Mark frames that were taken from a zone as the kernel's own, with one reference each.

        Those that are on no LRU list claim their page blocks, as they do in a kernel where most of these are free
        (try_to_claim_block(), mm/page_alloc.c).

        Args:
            pfns: int64, shape (pages,).
            flags: flags to set in addition to ALLOCATED and OWNED.
        """
        # try_to_claim_block() (mm/page_alloc.c) changes the whole page block to the migrate type of such a page.
        if Fl.LRU not in flags:
            self.unmovable[pfns >> self.geometry.pmd_order] = True
        self.flags[pfns] = Fl.ALLOCATED | Fl.OWNED
        for flag in flags:
            self.flags[pfns] |= flag
        self.order[pfns] = 0
        self.refcount[pfns] = 1
        self.mapcount[pfns] = 0
        self.content[pfns] = ZERO_CONTENT
        self.cgroup[pfns] = ROOT

    def charge(self, head: int, cgroup: int) -> bool:
        """Charge a new folio to a memory cgroup (mem_cgroup_charge); return False if that is at its limit."""
        if not self.cgroups.try_charge(cgroup, self.size(head)):
            return False
        self.cgroup[head] = cgroup
        return True

    def _prepare(self, head: int, order: int) -> None:
        run = slice(head, head + (1 << order))
        self.flags[run] = Fl.ALLOCATED
        self.order[run] = order
        self.refcount[run] = 0
        self.refcount[head] = 1
        self.mapcount[run] = 0
        self.content[run] = ZERO_CONTENT
        self.cgroup[head] = ROOT

    def put(self, head: int, references: int = 1) -> None:
        """Drop references to a folio, and free it with the last one (folio_put_refs)."""
        left = int(self.refcount[head]) - references
        assert left >= 0, f"folio {head} has {left} references"
        self.refcount[head] = left
        if left == 0:
            self._free(head)

    def put_small(self, pfns: Frames) -> None:
        """Drop one reference to each of some folios of order 0, and free those that had no other.

        Args:
            pfns: int64, shape (pages,), without duplicates.
        """
        self.refcount[pfns] -= 1
        # In runs, because a buddy that is freed with its neighbour merges only once.
        freed = np.sort(pfns[self.refcount[pfns] == 0])
        self.flags[freed] = 0
        self.cgroups.uncharge(self.cgroup[freed])
        for start, length in runs_of(freed):
            self.zone_of(start).free_range(start, length)

    def zone_of(self, pfn: int) -> Zone:
        """Return the zone that a frame lies in."""
        return self.zones[int(np.searchsorted(self._ends, pfn, side="right"))]

    def _free(self, head: int) -> None:
        order = int(self.order[head])
        flags = self.flags[head]
        assert not flags & (Fl.SWAPCACHE | Fl.LOCKED), f"folio {head} is freed with flags {flags:#x}"
        # nr_anon counts large anonymous folios only (__free_pages_prepare(), mm/page_alloc.c).
        if order and flags & Fl.ANON:
            self._counters.count_mthp(order, "nr_anon", -1)
            if flags & Fl.PARTIALLY_MAPPED:
                self._counters.count_mthp(order, "nr_anon_partially_mapped", -1)
        self.cgroups.uncharge(self.cgroup[head : head + 1], 1 << order)
        # A folio that is freed leaves the list, whatever the reason for which it was there.
        self.deferred.pop(head, None)
        self.give_back(head, order)

    def give_back(self, head: int, order: int) -> None:
        """Free the frames of a block, whatever their state."""
        run = slice(head, head + (1 << order))
        self.flags[run] = 0
        self.order[run] = 0
        self.refcount[run] = 0
        self.mapcount[run] = 0
        self.zone_of(head).free(head, order)
