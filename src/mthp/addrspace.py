"""The seam: the interface between the engine and all address spaces.

Behind it are a live Linux process (:mod:`mthp.linux`), a recorded snapshot (:mod:`mthp.snapshot`) and a simulated
machine (:mod:`mthp.sim`). An :class:`AddressSpace` lists its mappings as :class:`Vma`, reads its page table entries
as :class:`PteColumns`, and collapses. Reads take blocks of segments, so that memory use stays bounded however large
the target is; a segment is a half-open pair of page-aligned addresses.

A live address space changes while it is read. Memory unmapped in the meantime reads as nothing mapped; a process that
exits raises :class:`~mthp.errors.TargetVanishedError`; a collapse that fails is a
:class:`~mthp.results.ScanResult`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np

from mthp.blockstates import EXITED, already, shown, states_of
from mthp.closing import Closing
from mthp.errors import TargetVanishedError, UsageError
from mthp.geometry import Geometry
from mthp.means import USUAL_MEANS, Means, Mechanism
from mthp.outline import HUGE, PRESENT, SWAP, ZERO, Outline, outline_of
from mthp.ptes import Block, Pte, PteColumns, Segment, in_portions, segments_of
from mthp.results import BlockOutcome, ScanResult
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma


class AddressSpace(Closing, abc.ABC):
    """One address space and its machine. A context manager that releases the target at the end of the block.

    One thread may list the mappings while another reads.
    """

    @property
    @abc.abstractmethod
    def geometry(self) -> Geometry:
        """The geometry of the machine."""

    @property
    @abc.abstractmethod
    def label(self) -> str:
        """The name to print, such as ``"1234 (redis-server)"``."""

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
        """The properties that the rights do not suffice to read, each as a sentence with the remedy."""

    @abc.abstractmethod
    def vmas(self) -> list[Vma]:
        """Return the mappings, by ascending address.

        Raises:
            TargetVanishedError: the process is gone.
        """

    @abc.abstractmethod
    def read(self, segments: Sequence[Segment]) -> PteColumns:
        """Return the page table entries of `segments`, one after another.

        Raises:
            TargetVanishedError: the process is gone.
        """

    def collapse(self, address: int, order: int) -> BlockOutcome:
        """Collapse the aligned run at `address` to one folio of `order`, and return the outcome.

        Raises:
            MthpError: as :meth:`collapse_blocks`.
        """
        return self.collapse_blocks([(address, order)])[0]

    def collapse_blocks(
        self, blocks: Sequence[Block], means: Means = USUAL_MEANS, before: PteColumns | None = None
    ) -> list[BlockOutcome]:
        """Collapse disjoint `blocks`, as many at a time as `means` allows; return their outcomes in order.

        The page tables decide: SUCCEED means that the block lies in one folio of its order or a larger one, and did not
        before. A block that did before is left alone (PMD_MAPPED, PTE_MAPPED_HUGEPAGE). If the target exits in the
        meantime, blocks that were left, or could not be read again, have ANY_PROCESS.

        Args:
            before: entries just read that contain the blocks; None to read them here.

        Raises:
            TargetVanishedError: the process is gone.
            UnsupportedError: this backend cannot collapse, at all or at this order.
            NotPermittedError: the rights do not suffice.
            UsageError: a block is not aligned, or its order does not exist.
        """
        geometry, page_size = self.geometry, self.geometry.page_size
        for address, order in blocks:
            if address % geometry.size_of(geometry.check_order(order)):
                raise UsageError(f"{address:#x} is not aligned to {geometry.label(order)}")
        if not blocks:
            return []
        columns = self.read(segments_of(blocks, page_size)) if before is None else before
        large = states_of(columns, blocks, geometry).large.tolist()
        left = [block for block, is_large in zip(blocks, large, strict=True) if not is_large]
        segments = segments_of(left, page_size)
        columns = columns.select(segments, page_size)
        claims = self.attempt_blocks(left, means, columns) if left else []
        try:
            after = states_of(self.read(segments), left, geometry)
        except TargetVanishedError:
            return [BlockOutcome(*block, ScanResult.ANY_PROCESS, EXITED) for block in blocks]
        outcomes = shown(claims, states_of(columns, left, geometry), after, geometry)
        seen = {(outcome.address, outcome.order): outcome for outcome in outcomes}
        return [seen.get(block) or already(block, geometry) for block in blocks]

    def attempt_blocks(self, blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        """Try to collapse disjoint `blocks` for :meth:`collapse_blocks`; return the mechanism's result of each.

        Args:
            before: the entries of the blocks, as just read.

        Raises:
            MthpError: as :meth:`collapse_blocks`.
        """
        return [self.attempt(address, order) for address, order in blocks]

    @abc.abstractmethod
    def attempt(self, address: int, order: int) -> BlockOutcome:
        """Try to collapse one block; return the mechanism's result, which the page tables may contradict.

        Raises:
            MthpError: as :meth:`collapse_blocks`.
        """

    def mechanism_for(self, order: int, asked: Mechanism) -> Mechanism | None:
        """Return the mechanism that makes a folio of `order` if `asked` is requested; None if none does.

        ``auto`` uses what the kernel offers. The mover injects code, so the user must name it.
        """
        if asked == "khugepaged":
            return asked
        if order == self.geometry.pmd_order:
            return None if asked == "move" else "madvise"
        if asked == "split" or (asked == "auto" and self.splits()):
            return "split"
        if asked == "auto" and self.drives_khugepaged(order):
            return "khugepaged"
        return "move" if "move" in asked else None

    def splits(self) -> bool:
        """Return whether a collapse of a PMD range and splits of its folio can make folios of any order here."""
        return False

    def drives_khugepaged(self, order: int) -> bool:
        """Return whether the machine's khugepaged makes folios of `order`, and the rights suffice to drive it."""
        return False

    def mapped(self) -> list[Segment]:
        """Return the ranges of all mappings, by ascending address, without the slow parts of :meth:`vmas`.

        Raises:
            TargetVanishedError: the process is gone.
        """
        return [(vma.start, vma.end) for vma in self.vmas()]

    def populated(self, segments: Sequence[Segment], granule: int) -> list[Segment]:
        """Return the parts of `segments` that may have contents, in whole granules of `granule` bytes.

        The rest reads as none throughout. A backend that cannot tell cheaply returns `segments`.
        """
        return list(segments)

    def outline(self, segments: Sequence[Segment]) -> Outline:
        """Return the outline of the PMD ranges of `segments`, which are whole and ascend, without their folios.

        A backend that cannot tell cheaply reads everything.

        Raises:
            TargetVanishedError: the process is gone.
        """
        parts = [
            _outline_of_portion(self.read(portion), self.geometry)
            for portion in in_portions(segments, _OUTLINE_PMD_RANGES * self.geometry.pmd_size)
        ]
        return Outline.joined(parts)

    def close(self) -> None:
        """Release the target."""
        return


_OUTLINE_PMD_RANGES = 128
"""PMD ranges per read for an outline."""


def _outline_of_portion(columns: PteColumns, geometry: Geometry) -> Outline:
    """Return the outline of what was read: runs of pages of one kind."""
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
