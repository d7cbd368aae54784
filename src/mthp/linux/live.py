"""The seam on a live process: :class:`LiveAddressSpace`, opened with :func:`open_live`.

All reads are positioned, and every listing of mappings opens its own file, so threads may call
:meth:`~LiveAddressSpace.vmas` and :meth:`~LiveAddressSpace.read` side by side.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from mthp.abilities import Reading, Watch
from mthp.budget import MemoryBound
from mthp.errors import MthpError, NotPermittedError
from mthp.freememory import FreeMemory, MemoryBlocks
from mthp.geometry import Geometry
from mthp.heat import Heat, HeatRequest
from mthp.linux import abi, procfs
from mthp.linux.contents import Contents
from mthp.linux.facts import FactsReader
from mthp.linux.framewords import KPAGECOUNT, FrameWords
from mthp.linux.kpageflags import KPAGEFLAGS, FolioReader
from mthp.linux.madvise import Madvise
from mthp.linux.memoryblocks import memory_blocks
from mthp.linux.memorylimits import free_memory, memory_bounds
from mthp.linux.pagecolumns import ColumnReader
from mthp.linux.pagemap import Pagemap, can_see_pfns, scan_outline
from mthp.linux.pins import pinned_by
from mthp.linux.process import Process, ProcStat
from mthp.linux.processspace import ProcessSpace
from mthp.linux.split.blocks import SplitBlocks
from mthp.linux.split.file import split_ability
from mthp.linux.split.zeroes import Trimmer
from mthp.linux.sysfs import ThpSysfs
from mthp.linux.watch import LiveWatch
from mthp.means import Means, Mechanism
from mthp.movechecks import refuse_vma
from mthp.naming import ALL
from mthp.outline import Outline
from mthp.ptes import Block, PteColumns, Segment, segments_of
from mthp.results import BlockOutcome, ScanResult
from mthp.trimming import TrimBy, TrimOutcome
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma

if TYPE_CHECKING:
    from mthp.linux.journal.switches import SwitchJournal
    from mthp.linux.kernel_khugepaged import KernelKhugepaged
    from mthp.linux.mover.mover import Mover

SPARSE_BYTES = 64 << 20
"""Requests below this size are read without a scan for their populated parts."""

SPARSE_RATIO = 4
"""Use PAGEMAP_SCAN to skip holes only if the request is this many times RSS plus swap."""

NO_PFNS = (
    "not visible: page frame numbers, and with them the folio orders below the PMD size, lazily freed pages and KSM"
    " pages; CAP_SYS_ADMIN shows them (run as root)"
)
NEEDS_MOVER = "MADV_COLLAPSE makes folios of the PMD size only: smaller ones need the mechanism move"
NEEDS_CALL = "the mover makes no folios of the PMD size: MADV_COLLAPSE does"
NO_SCAN = (
    "where PMD entries map, beyond the sums of smaps for whole mappings: Linux 6.7 or later shows it (PAGEMAP_SCAN)"
)


class LiveAddressSpace(ProcessSpace):
    """One process of this machine.

    Args:
        process: the process; closed with this object.

    Attributes:
        guarded: for this process itself: whether others may use memory that is being moved. Set it beforehand.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self.guarded = True
        self.sysfs = ThpSysfs()
        self._geometry = self.sysfs.geometry()
        self._pagemap = Pagemap(process)
        self._folios, self._no_folios = _open_folios(self._geometry)
        self._columns = ColumnReader(self._pagemap, self._folios, self._geometry)

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    @property
    def label(self) -> str:
        return self.process.label

    @property
    def kernel(self) -> str:
        return os.uname().release

    @property
    def switches(self) -> Switches:
        return self.sysfs.switches(self._geometry)

    @property
    def tunables(self) -> Tunables:
        return self.sysfs.tunables(self._geometry)

    @property
    def thp_disabled(self) -> bool:
        """Return whether the process switched THP off for itself (THP_enabled in proc_pid_status(5))."""
        return self.process.status("THP_enabled") == "0"

    @property
    def missing(self) -> tuple[str, ...]:
        """Return what these rights or this kernel do not show, each with a remedy."""
        missing = [self._no_folios] if self._no_folios else []
        if not self._pagemap.can_scan:
            missing.append(NO_SCAN if self._folios else f"{NO_SCAN}; and the zero page")
        return tuple(missing)

    def shows_pmd_entries(self) -> bool:
        """Return whether PAGEMAP_SCAN shows them, which takes no rights beyond those to read pagemap."""
        return self._pagemap.can_scan

    def vmas(self) -> list[Vma]:
        return procfs.read_vmas(self.process)

    def mapped(self) -> list[Segment]:
        return procfs.read_mapped(self.process)

    def with_nodes(self, vmas: Sequence[Vma]) -> list[Vma]:
        nodes = procfs.read_numa(self.process, self._geometry.page_size)
        return [replace(vma, node_pages=nodes.get(vma.start, ())) for vma in vmas]

    def free_memory(self) -> FreeMemory | None:
        return free_memory()

    def memory_blocks(self, free: FreeMemory) -> MemoryBlocks | None:
        return memory_blocks(free, self._geometry.pmd_order)

    def measure_heat(self, request: HeatRequest, stop: Callable[[], bool]) -> Heat:
        # Imported here: DAMON uses the switch journal, which reading alone does not need.
        from mthp.linux.heat import measure_heat

        return measure_heat(self, request, stop)

    def watch(self) -> Watch:
        # Without frame numbers a page that moved into a huge one looks unchanged.
        return Reading(self) if self._folios is None else LiveWatch(self._pagemap, self._columns, self._geometry)

    def counters(self) -> dict[str, int]:
        stat = ProcStat.parse(self.process.read("stat"))
        counters = {"minflt": stat.minflt, "majflt": stat.majflt}
        for order, values in self.sysfs.stats(self._geometry).items():
            name = self._geometry.sysfs_name(order)
            counters |= {f"{name}/{counter}": value for counter, value in values.items()}
        return counters | self.sysfs.vmstat()

    def read(self, segments: Sequence[Segment]) -> PteColumns:
        """Return the page table entries of `segments`, one after another. It takes about 50 bytes of memory a page."""
        return self._columns.read(segments)

    def zero_filled(self, columns: PteColumns) -> NDArray[np.bool_]:
        return self._contents.zero_filled(columns)

    @cached_property
    def _contents(self) -> Contents:
        return Contents(self.process, self._geometry.page_size)

    def mapcounts(self, columns: PteColumns) -> NDArray[np.int64]:
        # Some kernels count large folios only as a whole: their pages then have the average (pagemap.rst).
        if columns.pfn is None:
            raise NotPermittedError("how often a page is mapped cannot be seen", help=NO_PFNS)
        counts = np.zeros(len(columns.pfn), np.int64)
        present = np.flatnonzero(columns.pfn)
        with FrameWords(KPAGECOUNT) as reader:
            counts[present] = reader.words(columns.pfn[present]).view(np.int64)
        return counts

    def populated(self, segments: Sequence[Segment], granule: int) -> list[Segment]:
        """Return the parts of `segments` that may be populated, in whole granules of `granule` bytes.

        PAGEMAP_SCAN searches for them only if `segments` are much larger than the process's memory and swap; otherwise
        reading everything is cheaper, and `segments` are returned.
        """
        self.process.check_alive()
        asked = sum(end - start for start, end in segments)
        # A scan costs about as much as reading for every page table that has entries, and nothing for the holes.
        if asked < SPARSE_BYTES or not self._pagemap.can_scan:
            return list(segments)
        swapped = int((self.process.status("VmSwap") or "0").split()[0]) << 10
        if asked < SPARSE_RATIO * (self.resident_bytes() + swapped):
            return list(segments)
        found: list[Segment] = []
        for segment in segments:
            found += self._populated(segment, granule)
        return found

    def _populated(self, segment: Segment, granule: int) -> list[Segment]:
        found: list[Segment] = []
        for regions in self._pagemap.scan(segment, any_of=abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED):
            starts = regions[:, 0].astype(np.int64) // granule * granule
            ends = -(-regions[:, 1].astype(np.int64) // granule) * granule
            breaks = np.flatnonzero(starts[1:] > ends[:-1]) + 1
            firsts, lasts = starts[np.r_[0, breaks]], ends[np.r_[breaks - 1, len(ends) - 1]]
            for start, end in zip(firsts.tolist(), lasts.tolist(), strict=True):
                start, end = max(start, segment[0]), min(end, segment[1])
                # The granule of one answer may reach into the next one.
                if found and start <= found[-1][1]:
                    start = found.pop()[0]
                found.append((start, end))
        return found

    def outline(self, segments: Sequence[Segment]) -> Outline:
        return (
            scan_outline(self._pagemap, segments, self._geometry)
            if self._pagemap.can_scan
            else super().outline(segments)
        )

    def attempt(self, address: int, order: int) -> BlockOutcome:
        block = (address, order)
        return self.attempt_blocks([block], Means(), self.read(segments_of([block], self._geometry.page_size)))[0]

    def attempt_blocks(self, blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        """Collapse disjoint `blocks`, each by the mechanism that :meth:`mechanism_for` returns for its order.

        Without a mechanism, a block is not touched, and its outcome has the reason. MADV_COLLAPSE is a call of
        process_madvise(2), or of madvise(2) for this process.

        Raises:
            UnsupportedError: this kernel cannot, or not for this process.
            NotPermittedError: CAP_SYS_NICE or the right to read the process is missing.
        """
        by: dict[Mechanism | None, list[Block]] = {}
        for block in blocks:
            by.setdefault(self.mechanism_for(block[1], means.mechanism), []).append(block)
        outcomes: dict[Block, BlockOutcome] = {}
        for mechanism, chosen in by.items():
            outcomes |= zip(chosen, self._attempt_by(mechanism, chosen, means, before), strict=True)
        return [outcomes[block] for block in blocks]

    def _attempt_by(
        self, mechanism: Mechanism | None, blocks: list[Block], means: Means, before: PteColumns
    ) -> list[BlockOutcome]:
        """Collapse `blocks` by one mechanism; None does not touch them."""
        if mechanism == "madvise":
            return Madvise(self).collapse(blocks)
        if mechanism == "move":
            return self._mover.collapse(blocks, means, before)
        if mechanism == "khugepaged":
            # It chooses the ranges itself, so it does not keep a limit of bloat.
            return self._khugepaged().collapse(blocks, fill=means.fill and means.max_bloat is None)
        if mechanism == "split":
            return self._splitter.collapse(blocks, means)
        needs = {True: NEEDS_CALL, False: NEEDS_MOVER}
        pmd_order = self._geometry.pmd_order
        return [BlockOutcome(*block, ScanResult.FAIL, needs[block[1] == pmd_order]) for block in blocks]

    def splits(self) -> bool:
        return self._folios is not None and split_ability(self._geometry).splits

    @cached_property
    def _splitter(self) -> SplitBlocks:
        return SplitBlocks(self)

    @property
    def trims_by(self) -> tuple[TrimBy, ...]:
        ability = split_ability(self._geometry)
        ways: tuple[tuple[TrimBy, bool | None], ...] = (("split", ability.splits), ("cold", ability.cold))
        return tuple(by for by, works in ways if works and self._folios is not None)

    def trim_folios(self, folios: Sequence[Block], zero: Sequence[NDArray[np.bool_]], by: TrimBy) -> list[TrimOutcome]:
        return self._trimmer.trim(folios, zero, by)

    @cached_property
    def _trimmer(self) -> Trimmer:
        return Trimmer(self)

    def drives_khugepaged(self, order: int) -> bool:
        return self._khugepaged().makes(order)

    def _khugepaged(self) -> KernelKhugepaged:
        # Imported here: it uses the switch journal, which reading alone does not need.
        from mthp.linux.kernel_khugepaged import KernelKhugepaged

        return KernelKhugepaged(self)

    def take_pauses(self) -> list[int]:
        # Looked up in vars(): the property would make a mover, only to find that it has no pauses.
        return self._mover.take_pauses() if "_mover" in vars(self) else []

    def take_calls(self) -> list[int]:
        return self._splitter.take_calls() if "_splitter" in vars(self) else []

    def threads(self) -> int:
        return int(self.process.status("Threads") or 1)

    def resident_bytes(self) -> int:
        return int(self.process.read("statm").split()[1]) * self._geometry.page_size

    def memory_bounds(self) -> list[MemoryBound]:
        return memory_bounds(self.process.read("cgroup").decode(errors="replace"))

    def move_refusals(self, means: Means) -> list[str]:
        return [f"{why.reason} ({why.remedy})" if why.remedy else why.reason for why in self._mover.refusals(means)]

    @property
    def service(self) -> str:
        facts = FactsReader().read(self.process.pid, ALL)
        # The facts are read by PID, which may be another process's by now.
        return facts.service if facts is not None and facts.starttime == self.process.starttime else ""

    def objections(self, vma: Vma | None) -> list[str]:
        if vma is None:
            return self.move_refusals(Means(mechanism="move"))
        refusal = refuse_vma(vma)
        return [refusal.reason] if refusal is not None else []

    def pins(self, vma: Vma | None) -> list[str]:
        return pinned_by(self.process, vma)

    @cached_property
    def _mover(self) -> Mover:
        return self._make_mover()

    def _make_mover(self, journal: SwitchJournal | None = None) -> Mover:
        # Imported here: reading alone does not need them.
        from mthp.linux.journal.switches import SwitchJournal
        from mthp.linux.mover.mover import Mover, hold_of
        from mthp.linux.mover.movetarget import MoveTarget

        target = MoveTarget(self.process, self._geometry, self.read, self.mapcounts)
        hold = hold_of(target, guarded=self.guarded)
        return Mover(target, hold, journal or SwitchJournal(sysfs=self.sysfs))

    def close(self) -> None:
        for name in ("_mover", "_splitter", "_trimmer", "_contents"):
            if made := vars(self).pop(name, None):
                made.close()
        self._pagemap.close()
        if self._folios:
            self._folios.close()
        self.process.close()


def open_live(target: int | Literal["self"]) -> LiveAddressSpace:
    """Open a process of this machine.

    Args:
        target: a PID, or ``"self"``.

    Raises:
        TargetVanishedError: there is no such process.
        UnsupportedError: a kernel thread.
        UsageError: not a PID, or that of a thread.
    """
    process = Process(target)
    try:
        return LiveAddressSpace(process)
    except MthpError:
        process.close()
        raise


def _open_folios(geometry: Geometry) -> tuple[FolioReader | None, str]:
    """Return a reader of kpageflags if these rights include frame numbers, otherwise None and the reason."""
    if not can_see_pfns():
        return None, NO_PFNS
    try:
        return FolioReader(geometry.pmd_order), ""
    except OSError as error:
        return None, f"folio orders below the PMD size: {KPAGEFLAGS}: {error.strerror} (run as root)"
