"""The simulated machine's address spaces as :class:`~mthp.addrspace.AddressSpace`.

Page tables and frames of the simulated machine take the place of pagemap and kpageflags, so everything above the seam
runs on it as on a process: inspect, plan, collapse, the daemon.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace
from mthp.errors import TargetVanishedError
from mthp.freememory import FreeMemory, MemoryBlocks, parse_free_memory
from mthp.geometry import Geometry
from mthp.means import Means
from mthp.ptes import Block, Pte, PteColumns, Segment
from mthp.results import BlockOutcome, ScanResult
from mthp.sim.allocation.compact_all import memory_blocks
from mthp.sim.collapse.inplace import divide, trim_folio
from mthp.sim.collapse.move import move_block
from mthp.sim.collapse.scan import CollapseControl, SimRange
from mthp.sim.mm import Mm, Pmd
from mthp.sim.page_tables.entries import columns_of, tables_in
from mthp.sim.parts import Parts
from mthp.sim.zones import buddyinfo, zoneinfo
from mthp.splitchecks import Refusal, layout_of, refusal_of_mapping, refusal_of_pages
from mthp.trimchecks import trim_each
from mthp.trimming import TrimBy, TrimOutcome
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma


class SimSpace(AddressSpace):
    """One address space of a simulated machine.

    Args:
        parts: parts of its machine.
        mm: the address space.
    """

    def __init__(self, parts: Parts, mm: Mm) -> None:
        self._parts = parts
        self._mm = mm
        self._calls_ns: list[int] = []

    @property
    def geometry(self) -> Geometry:
        return self._parts.geometry

    @property
    def label(self) -> str:
        """Number of the address space: ``"1 (simulated)"``."""
        return f"{self._mm.id} (simulated)"

    @property
    def kernel(self) -> str:
        """The simulated kernel and its policy."""
        return f"simulated, policy {self._parts.policy.name}"

    @property
    def switches(self) -> Switches:
        return self._parts.switches

    @property
    def tunables(self) -> Tunables:
        return self._parts.tunables

    @property
    def thp_disabled(self) -> bool:
        return self._mm.thp_disabled

    @property
    def missing(self) -> tuple[str, ...]:
        """Empty: everything can be read."""
        return ()

    def vmas(self) -> list[Vma]:
        self._check_alive()
        return [vma.described() for vma in self._mm.vmas]

    def with_nodes(self, vmas: Sequence[Vma]) -> list[Vma]:
        self._check_alive()
        memory, counted = self._parts.memory, []
        for vma in vmas:
            pfn = columns_of(self._parts, self._mm, [(vma.start, vma.end)]).pfn
            assert pfn is not None, "the machine sees its own frames"
            nodes = Counter(memory.nodes_of(pfn[pfn > 0].astype(np.int64)).tolist())
            counted.append(dataclasses.replace(vma, node_pages=tuple(sorted(nodes.items()))))
        return counted

    def read(self, segments: Sequence[Segment]) -> PteColumns:
        self._check_alive()
        return columns_of(self._parts, self._mm, segments)

    def zero_filled(self, columns: PteColumns) -> NDArray[np.bool_]:
        """Return which present pages have content 0, as pages that a collapse filled do."""
        self._check_alive()
        assert columns.pfn is not None, "the machine sees its own frames"
        contents = self._parts.memory.content[columns.pfn.astype(np.int64)]
        zero: NDArray[np.bool_] = columns.has(Pte.PRESENT) & (columns.has(Pte.ZERO) | (contents == 0))
        return zero

    def free_memory(self) -> FreeMemory:
        """The machine's, from the files that it prints."""
        return parse_free_memory(buddyinfo(self._parts), zoneinfo(self._parts))

    def memory_blocks(self, free: FreeMemory) -> MemoryBlocks:
        return memory_blocks(self._parts)

    def populated(self, segments: Sequence[Segment], granule: int) -> list[Segment]:
        """Return the parts of `segments` that have page tables or are mapped by PMD entries, in whole granules."""
        self._check_alive()
        found: list[Segment] = []
        for segment in segments:
            found += self._populated(segment, granule)
        return found

    def _populated(self, segment: Segment, granule: int) -> list[Segment]:
        page, n = self.geometry.page_size, self.geometry.ptes_per_pmd
        found: list[Segment] = []
        for table, low, high in tables_in(self._mm, segment[0] // page, -(-segment[1] // page), n):
            # Page tables stand for what is populated, as PAGEMAP_SCAN skips empty ones.
            rows = np.flatnonzero(table.pmd != Pmd.NONE) + table.first
            breaks = np.flatnonzero(np.diff(rows) > 1) + 1
            for run in np.split(rows, breaks) if len(rows) else []:
                start = max(low, int(run[0]) * n) * page // granule * granule
                end = -(-min(high, (int(run[-1]) + 1) * n) * page // granule) * granule
                start, end = max(start, segment[0]), min(end, segment[1])
                if found and start <= found[-1][1]:
                    start = found.pop()[0]
                if start < end:
                    found.append((start, end))
        return found

    def attempt_blocks(self, blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        """Collapse blocks one by one, or, with the mechanism ``split``, the PMD ranges that they lie in.

        Blocks in no whole PMD range of their mapping are moved, if the mechanism does that.

        Raises:
            TargetVanishedError: the process exited.
        """
        self._check_alive()
        ranges: dict[int, list[Block]] = {}
        outcomes: dict[Block, BlockOutcome] = {}
        for block in blocks:
            # One collapse makes all blocks of a PMD range.
            if self.mechanism_for(block[1], means.mechanism) == "split":
                ranges.setdefault(block[0] // self.geometry.pmd_size * self.geometry.pmd_size, []).append(block)
            else:
                outcomes[block] = self._attempt_one(block, means)
        for start, chosen in ranges.items():
            began = self._parts.clock.now_ns
            results = self._make_in_range(start, chosen, means.min_split_share)
            elapsed = (self._parts.clock.now_ns - began) // len(chosen)
            for block, (result, reason) in results.items():
                outcomes[block] = BlockOutcome(*block, result, reason, elapsed_ns=elapsed)
        return [outcomes[block] for block in blocks]

    def take_calls(self) -> list[int]:
        calls, self._calls_ns = self._calls_ns, []
        return calls

    def _make_in_range(self, start: int, blocks: list[Block], share: float) -> dict[Block, Refusal]:
        """Collapse a PMD range and split its folio down to `blocks`; return result and reason of each."""
        geometry = self.geometry
        vma = self._mm.find_vma(start)
        inside = None if vma is None or vma.start > start else vma.described()
        refusal = refusal_of_mapping(inside, start, geometry, thp_disabled=self.thp_disabled)
        # A mapping that begins inside the PMD range: it is not missing, but does not cover the range.
        if vma is not None and start < vma.start <= blocks[0][0]:
            refusal = ScanResult.ADDRESS_RANGE, ""
        # The same checks as for a live process, so that the simulation predicts it.
        if refusal is None and inside is not None:
            columns = self.read([(start, start + geometry.pmd_size)])
            layout = layout_of(start, blocks, columns, geometry)
            refusal = refusal_of_pages(layout, columns, locked="lo" in inside.flags, least_share=share)
        if refusal is None:
            began = self._parts.clock.now_ns
            result = self._collapse(start, geometry.pmd_order)
            self._calls_ns.append(self._parts.clock.now_ns - began)
            refusal = None if result is ScanResult.SUCCEED else (result, "")
        if refusal is not None:
            return dict.fromkeys(blocks, refusal)
        head = self._parts.memory.head(int(self._mm.ptes(start, 1).value[0]))
        results = dict.fromkeys(blocks, (ScanResult.SUCCEED, ""))
        for first, order in divide(
            self._parts, self._mm, (start, geometry.pmd_order), head, layout.orders, self._calls_ns
        ):
            begin = start + first * geometry.page_size
            inside_it = [block for block in blocks if begin <= block[0] < begin + geometry.size_of(order)]
            results |= dict.fromkeys(inside_it, (ScanResult.PAGE_COUNT, "its folio could not be split"))
        return results

    def splits(self) -> bool:
        """Return True: every simulated kernel is one of Linux 6.12 or later, with debugfs open."""
        return True

    @property
    def trims_by(self) -> tuple[TrimBy, ...]:
        """Both ways, as on Linux 6.12 and later with debugfs open."""
        return "split", "cold"

    def trim_folios(self, folios: Sequence[Block], zero: Sequence[NDArray[np.bool_]], by: TrimBy) -> list[TrimOutcome]:
        self._check_alive()
        return trim_each(
            self,
            folios,
            zero,
            lambda folio, head, pages: trim_folio(self._parts, self._mm, folio, head, pages, by),
            lambda: None,
        )

    def _attempt_one(self, block: Block, means: Means) -> BlockOutcome:
        """Collapse one block; move it if the mechanism does that and it lies in no whole PMD range of its mapping."""
        address, order = block
        size, began = self.geometry.pmd_size, self._parts.clock.now_ns
        start, vma = address // size * size, self._mm.find_vma(address)
        # The steps of a collapse need the whole PMD range in one mapping (hugepage_vma_revalidate()).
        is_whole = order == self.geometry.pmd_order or (vma is not None and vma.covers(start, start + size))
        # The steps of a collapse are cheaper than a move, and have the same result.
        if is_whole or "move" not in means.mechanism:
            return self.attempt(address, order)
        result, reason = move_block(self._parts, self._mm, address, order, fill=means.fill)
        return BlockOutcome(address, order, result, reason, elapsed_ns=self._parts.clock.now_ns - began)

    def attempt(self, address: int, order: int) -> BlockOutcome:
        """Collapse one run of any order, by the steps of MADV_COLLAPSE.

        Raises:
            TargetVanishedError: the process exited.
        """
        self._check_alive()
        began = self._parts.clock.now_ns
        result = self._collapse(address, order)
        return BlockOutcome(address, order, result, elapsed_ns=self._parts.clock.now_ns - began)

    def _collapse(self, address: int, order: int) -> ScanResult:
        parts, geometry = self._parts, self.geometry
        start = address // geometry.pmd_size * geometry.pmd_size
        vma = self._mm.find_vma(start)
        if vma is None or vma.start > address:
            return ScanResult.VMA_NULL
        if not vma.covers(start, start + geometry.pmd_size):
            return ScanResult.ADDRESS_RANGE
        orders = parts.collapse_orders(self._mm, vma, "madvise")
        if order not in orders:
            return ScanResult.VMA_CHECK
        pmd = self._mm.pmd(start)
        if pmd is Pmd.HUGE:
            # madvise_collapse() counts PMD_MAPPED as done.
            return ScanResult.SUCCEED
        if pmd is Pmd.NONE or not self._mm.ptes(address, 1 << order).bits.any():
            return ScanResult.NO_PTE_TABLE
        parts.lru.drain()
        control = CollapseControl.begun(parts, "madvise", orders)
        target = SimRange(parts, self._mm, vma, control)
        scans_runs = parts.policy.scans_each_run
        scan = target.scan_run(address, order) if scans_runs else target.scan_pmd(start)
        return scan.result if scan.result is not ScanResult.SUCCEED else target.collapse_huge_page(address, order, scan)

    def _check_alive(self) -> None:
        if self._mm.exiting:
            raise TargetVanishedError(f"process {self.label} exited")
