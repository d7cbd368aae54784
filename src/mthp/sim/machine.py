"""The simulated machine: memory, swap, address spaces, khugepaged and MADV_COLLAPSE.

>>> from mthp.sim import Machine
>>> machine = Machine()
>>> mm = machine.create_mm()
>>> vma = machine.map(mm, 1 << 21, 2 << 21, flags={"hg"})
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from mthp.engine.policy import DEFAULT_MTHP_MIN_ORDER, Policy
from mthp.engine.policy_lookup import policy_named
from mthp.errors import UsageError
from mthp.geometry import X86_64, Geometry
from mthp.sim.address_space import syscalls
from mthp.sim.address_space.access import Fault, access, make_present
from mthp.sim.address_space.advice import madvise
from mthp.sim.address_space.calls import ADDRESS_LIMIT, SystemCalls
from mthp.sim.address_space.touch import Touched, touch
from mthp.sim.allocation.fragment import fragment
from mthp.sim.clock import Clock, Costs
from mthp.sim.collapse.madvcollapse import madvise_collapse
from mthp.sim.collapse.simkhugepaged import Advised, SimTime, SimulatedKhugepaged
from mthp.sim.counters import Counters
from mthp.sim.frames.lru import LruAddBatch
from mthp.sim.frames.memory import Memory
from mthp.sim.frames.rmap import Rmap
from mthp.sim.frames.swap import Swap
from mthp.sim.kernel import NEWEST, Kernel
from mthp.sim.mm import Mm, SimVma
from mthp.sim.parts import Parts
from mthp.sim.space import SimSpace
from mthp.sim.state import columns, digest
from mthp.sim.sysfs import Sysfs
from mthp.sim.trace import EventTrace
from mthp.tunables import Switches, Tunables

GUP_PIN = 1024
"""References that a pin takes to a folio of order 0 (GUP_PIN_COUNTING_BIAS, include/linux/mm.h)."""

MAX_MMS = 0x7FFE
"""Most address spaces of a machine at a time, because a large folio has 15 bits for the number of one."""


_POPULATED = 1 << 18
"""Pages that are populated at a time, so that their addresses need little memory."""


class Machine(SystemCalls):
    """One simulated machine with one CPU.

    Args:
        node_frames: frames of each NUMA node; by default one node of 64 PMD ranges.
        low_frames: frames of the first node in the zone DMA32, which is tried last; by default none. Only random life
            tests use it.
        swap_slots: pages of the swap device.
        switches, tunables: by default those that a kernel starts with.
        policy: policy of khugepaged and MADV_COLLAPSE.
        costs: simulated time of each operation.
        node_distances: distance of every node to every node, as in ``/sys/devices/system/node/node0/distance``; by
            default 20.
        mthp_min_order: the seed's MTHP_MIN_ORDER, for the policy ``rfc``; 3 by default.
        kernel: rules of the kernel, apart from the policy; by default those of the newest release.

    Raises:
        UsageError: the policy does not exist, a node has no frame, or a limit is out of range.

    Attributes:
        parts: memory, swap, LRU, reverse map, counters and trace.
        geometry: page size and PMD order.
        counters: vmstat, khugepaged's counts and the per-size stats.
        trace: the trace events of the collapse path.
        clock: simulated time, and the operations that it was spent on.
        mms: the address spaces, by number.
    """

    def __init__(
        self,
        geometry: Geometry = X86_64,
        *,
        node_frames: Sequence[int] | None = None,
        low_frames: int = 0,
        swap_slots: int = 0,
        switches: Switches | None = None,
        tunables: Tunables | None = None,
        policy: str | Policy = "mainline",
        costs: Costs | None = None,
        node_distances: Sequence[Sequence[int]] | None = None,
        mthp_min_order: int | None = None,
        kernel: Kernel = NEWEST,
    ) -> None:
        chunk_order = min(DEFAULT_MTHP_MIN_ORDER, geometry.pmd_order) if mthp_min_order is None else mthp_min_order
        counters = Counters(geometry)
        frames = node_frames or [64 * geometry.ptes_per_pmd]
        memory = Memory(geometry, frames, counters, node_distances, low_frames)
        self.parts = Parts(
            geometry,
            policy_named(policy),
            geometry.check_order(chunk_order),
            (tunables or Tunables.defaults(geometry)).checked(geometry),
            switches or Switches.defaults(geometry),
            memory,
            Swap(memory, swap_slots),
            LruAddBatch(memory),
            Rmap(memory, counters, by_first_page=kernel.shared_by_first_page),
            counters,
            EventTrace(),
            Clock(costs),
            kernel=kernel,
        )
        self.geometry, self.counters, self.mms = geometry, counters, self.parts.mms
        self.trace, self.clock = self.parts.trace, self.parts.clock
        self.khugepaged = SimulatedKhugepaged(self.parts)

    @functools.cached_property
    def sysfs(self) -> Sysfs:
        """The files below transparent_hugepage, and some of ``/proc``."""
        # Not before it is used: making its 200 files takes a tenth of the time of a golden case.
        return Sysfs(self.parts)

    @property
    def time(self) -> SimTime:
        """The clock for a :class:`mthp.Khugepaged` that visits address spaces of this machine."""
        return SimTime(self.parts.clock)

    def create_mm(self, cgroup: int = 0) -> Mm:
        """Create an empty address space.

        Raises:
            UsageError: the machine has too many already.
        """
        # The lowest free one: a large folio keeps the numbers of its address spaces in 15 bits.
        number = next((n for n in range(1, MAX_MMS + 1) if n not in self.mms), None)
        if number is None:
            raise UsageError(f"a machine has at most {MAX_MMS} address spaces")
        mm = Mm(number, self.geometry, cgroup)
        self.mms[number] = mm
        return mm

    def space(self, mm: Mm) -> SimSpace:
        """Return an address space for :func:`mthp.engine.planning.plan_space` and similar functions."""
        return SimSpace(self.parts, mm)

    def map(self, mm: Mm, start: int, end: int, *, flags: Iterable[str] = (), anon_vma: bool = False) -> SimVma:
        """Add a private anonymous mapping.

        Args:
            start, end: half-open range of addresses.
            flags: two-letter words of VmFlags.
            anon_vma: create it as if it had been written already.

        Raises:
            UsageError: the range is not whole pages, outside user space, or overlaps another mapping.
        """
        page = self.geometry.page_size
        if start % page or end % page or not 0 < start < end <= ADDRESS_LIMIT:
            raise UsageError(f"{start:#x}-{end:#x} is not a range of whole pages of {page} bytes in user space")
        next_vma = mm.find_vma(start)
        if next_vma is not None and next_vma.start < end:
            raise UsageError(f"{start:#x}-{end:#x} overlaps the mapping at {next_vma.start:#x}")
        mm.insert_vma(SimVma(start, end, set(flags), self.parts.new_anon_vma() if anon_vma else 0))
        mm.merge_vmas(start, end)
        vma = mm.find_vma(start)
        assert vma is not None, "it was inserted"
        self.khugepaged.enter(mm, vma)
        return vma

    def read(self, mm: Mm, address: int) -> tuple[Fault, int]:
        """Read the page at `address` as a program; return the outcome, and the content of the page."""
        return access(self.parts, mm, address, None)

    def write(self, mm: Mm, address: int, content: int) -> Fault:
        """Write `content` to the page at `address` as a program; return the outcome."""
        outcome, _ = access(self.parts, mm, address, content)
        return outcome

    def touch(
        self,
        mm: Mm,
        addresses: ArrayLike,
        *,
        write: bool = True,
        contents: ArrayLike | None = None,
    ) -> Touched:
        """Read or write many pages as a program, in order.

        Ends early if an access ends with a signal or memory runs out. The result is that of as many calls of
        :meth:`read` or :meth:`write`, apart from the frame numbers, and much faster.

        Args:
            addresses: int64, shape (accesses,): address of one byte in each page.
            contents: uint32, same shape, or one number for all: new contents of the pages; by default the number of
                the page (its address divided by the page size, modulo 2**32), or 1 where that is 0.

        Returns:
            Number of accesses that happened, and the outcome of the next one.

        Raises:
            UsageError: an address is outside user space, or a read has contents.
        """
        where = np.asarray(addresses, np.int64).ravel()
        if len(where) and not 0 <= int(where.min()) <= int(where.max()) < ADDRESS_LIMIT:
            raise UsageError(f"addresses from {where.min():#x} to {where.max():#x} are not all in user space")
        if not write:
            if contents is not None:
                raise UsageError("a read leaves no contents: pass contents for writes only")
            return touch(self.parts, mm, where, None)
        if contents is None:
            # Not 0, which would be a page of zeroes.
            contents = np.maximum((where // self.geometry.page_size).astype(np.uint32), 1)
        return touch(self.parts, mm, where, np.broadcast_to(np.asarray(contents, np.uint32), where.shape))

    def populate(self, mm: Mm, start: int, end: int) -> Touched:
        """Write to every page of a range, as :meth:`touch` does."""
        page, done = self.geometry.page_size, 0
        for first in range(start, end, _POPULATED * page):
            touched = self.touch(mm, np.arange(first, min(end, first + _POPULATED * page), page, dtype=np.int64))
            done += touched.done
            if touched.outcome is not Fault.DONE:
                return Touched(done, touched.outcome)
        return Touched(done, Fault.DONE)

    def fragment(self, index: float, order: int | None = None, *, movable: float = 0.0, seed: int = 0) -> int:
        """Fragment free memory until the unusable free space index of `order` is at least `index`.

        The index is the share of the free memory in blocks smaller than `order`: 0 if all of it can be had in blocks of
        that order, 1 if none. See :func:`mthp.sim.allocation.fragment.fragment`.

        Args:
            order: by default the PMD order.
            movable: share of the pages allocated for this that compaction can move and reclaim can drop, from 0 to 1.
            seed: chooses their places.

        Returns:
            Pages allocated.

        Raises:
            UsageError: an index or a share is outside 0 to 1, or the allocator does not have the order.
        """
        order = self.geometry.pmd_order if order is None else order
        return fragment(self.parts, index, order, movable=movable, seed=seed)

    def madvise(self, mm: Mm, start: int, end: int, advice: str) -> int:
        """madvise(2) with ``"COLLAPSE"`` or a word of :mod:`~mthp.sim.address_space.advice`; return 0 or an errno."""
        if advice == "COLLAPSE":
            return self.madvise_collapse(mm, start, end)
        error = madvise(self.parts, mm, start, end, advice)
        # hugepage_madvise() registers the mapping with khugepaged; other advice does not.
        for vma in mm.vmas_in(start, end) if advice == "HUGEPAGE" else ():
            self.khugepaged.enter(mm, vma)
        return error

    def fork(self, parent: Mm) -> Mm:
        """Create a child with all mappings of `parent`.

        Raises:
            MemoryError: a pinned page could not be copied; no child was created.
        """
        child = self.create_mm(parent.charge)
        child.thp_disabled = parent.thp_disabled
        # copy_present_page() has failed: what was copied goes back with the child.
        if syscalls.fork(self.parts, parent, child):
            self.exit(child)
            raise MemoryError("out of memory for a copy of a pinned page")
        # khugepaged_fork(): the child is known if the parent is.
        if parent in self.khugepaged.mms:
            self.khugepaged.visit(child)
        return child

    def exit(self, mm: Mm) -> None:
        """End the last thread of a process."""
        syscalls.exit_mm(self.parts, mm)
        self.khugepaged.exit(mm)
        del self.mms[mm.id]

    def pin(self, mm: Mm, address: int) -> int:
        """Pin the page at `address` for I/O; return its frame, for :meth:`unpin`.

        Follows pin_user_pages() with FOLL_WRITE: the page is made present and exclusive, as for a write.

        Raises:
            UsageError: the address is not mapped, or a write would end with a signal.
        """
        page = self.geometry.page_size
        address = address // page * page
        vma = mm.find_vma(address)
        if vma is None or vma.start > address or not vma.permits(write=True):
            raise UsageError(f"nothing that may be written is mapped at {address:#x}")
        # As for a write, so that the page is exclusive: a later fork copies it instead of sharing it.
        outcome = make_present(self.parts, mm, vma, address, write=True)
        if outcome is not Fault.DONE or not mm.ptes(address, 1).pages()[0]:
            raise UsageError(f"the page at {address:#x} cannot be pinned: {outcome.value}")
        pfn = int(mm.ptes(address, 1).value[0])
        # A large folio has a counter of its own for pins (_pincount), and so one reference for each is enough.
        self._hold(pfn, GUP_PIN if self.parts.memory.order[pfn] == 0 else 1)
        return pfn

    def unpin(self, pfn: int) -> None:
        """Undo one pin of a frame."""
        head = self.parts.memory.head(pfn)
        references = GUP_PIN if self.parts.memory.order[pfn] == 0 else 1
        self.parts.pins[head] -= references
        self.parts.memory.put(head, references)

    def _hold(self, pfn: int, references: int) -> None:
        head = self.parts.memory.head(pfn)
        # Noted apart from the reference count: fork must know whether a folio is pinned (folio_maybe_dma_pinned()).
        self.parts.pins[head] += references
        self.parts.memory.refcount[head] += references

    def array_bytes(self) -> int:
        """Return the bytes of memory in all columns: of frames, of page table entries, of swap slots."""
        return sum(column.nbytes for column in columns(self.parts))

    def digest(self) -> str:
        """Return a checksum of the whole state, the same on any machine after the same calls."""
        return digest(self.parts)

    def madvise_collapse(self, mm: Mm, start: int, end: int) -> int:
        """madvise(start, end - start, MADV_COLLAPSE); return 0 or an errno (:mod:`mthp.sim.collapse.madvcollapse`)."""
        return madvise_collapse(Advised(self.parts, mm, self.khugepaged.count_advised), start, end)
