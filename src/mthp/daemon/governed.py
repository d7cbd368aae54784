"""An address space under the daemon's own rules: its switches and tunables are what the operator says they are.

Everything else is asked of the space behind it. So the engine, which takes switches and tunables from the address
space, needs no second way to be told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mthp import thp_unadvised
from mthp.addrspace import (
    USUAL_MEANS,
    AddressSpace,
    Block,
    Means,
    Mechanism,
    PteColumns,
    Segment,
    Vma,
    VmaKind,
    Watch,
)
from mthp.budget import MemoryBound
from mthp.geometry import Geometry
from mthp.outline import Outline
from mthp.results import BlockOutcome
from mthp.tunables import Switches, Tunables


class GovernedSpace(AddressSpace):
    """`inner` with other switches and tunables.

    Args:
        inner: the address space; closed with this one.

    Attributes:
        governed_switches, governed_tunables: those that hold; set them before each piece of work.
        reasons: why blocks could not be collapsed, where the space said so.
        has_room: whether any anonymous mapping is as large as a PMD range.
        touching: whether the target's memory is being worked on at this moment.
        unadvised_small: whether the mover can make folios only in advised memory of it (mthp.thp_unadvised).
    """

    def __init__(self, inner: AddressSpace, switches: Switches, tunables: Tunables) -> None:
        self._inner = inner
        self.governed_switches = switches
        self.governed_tunables = tunables
        self.reasons: Counter[str] = Counter()
        self.touching = False
        self.has_room = True
        self.unadvised_small = False

    @property
    def geometry(self) -> Geometry:
        return self._inner.geometry

    @property
    def label(self) -> str:
        return self._inner.label

    @property
    def kernel(self) -> str:
        return self._inner.kernel

    @property
    def switches(self) -> Switches:
        return self.governed_switches

    @property
    def tunables(self) -> Tunables:
        return self.governed_tunables

    @property
    def thp_disabled(self) -> bool:
        return self._inner.thp_disabled

    @property
    def missing(self) -> tuple[str, ...]:
        return self._inner.missing

    def vmas(self) -> list[Vma]:
        vmas = self._inner.vmas()
        self.has_room = any(vma.kind is VmaKind.ANON and vma.size >= self.geometry.pmd_size for vma in vmas)
        return vmas

    def with_nodes(self, vmas: Sequence[Vma]) -> list[Vma]:
        return self._inner.with_nodes(vmas)

    def read(self, segments: Sequence[Segment]) -> PteColumns:
        return self._inner.read(segments)

    def zero_filled(self, columns: PteColumns) -> NDArray[np.bool_]:
        return self._inner.zero_filled(columns)

    def attempt(self, address: int, order: int) -> BlockOutcome:
        return self._inner.attempt(address, order)

    def attempt_blocks(self, blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        return self._inner.attempt_blocks(blocks, means, before)

    def collapse_blocks(
        self, blocks: Sequence[Block], means: Means = USUAL_MEANS, before: PteColumns | None = None
    ) -> list[BlockOutcome]:
        self.touching = True
        try:
            outcomes = thp_unadvised.corrected(self._inner, blocks, self._inner.collapse_blocks(blocks, means, before))
        finally:
            self.touching = False
        self.unadvised_small |= any(outcome.reason == thp_unadvised.REASON for outcome in outcomes)
        self.reasons.update(outcome.reason for outcome in outcomes if outcome.reason)
        return outcomes

    def mechanism_for(self, order: int, asked: Mechanism) -> Mechanism | None:
        return self._inner.mechanism_for(order, asked)

    def drives_khugepaged(self, order: int) -> bool:
        return self._inner.drives_khugepaged(order)

    def take_pauses(self) -> list[int]:
        return self._inner.take_pauses()

    def threads(self) -> int:
        return self._inner.threads()

    def resident_bytes(self) -> int:
        return self._inner.resident_bytes()

    def memory_bounds(self) -> list[MemoryBound]:
        return self._inner.memory_bounds()

    def free_bytes(self, order: int) -> int | None:
        return self._inner.free_bytes(order)

    def move_hindrances(self, means: Means) -> list[str]:
        return self._inner.move_hindrances(means)

    def watch(self) -> Watch:
        return self._inner.watch()

    def counters(self) -> dict[str, int]:
        return self._inner.counters()

    def mapped(self) -> list[Segment]:
        return self._inner.mapped()

    def populated(self, segments: Sequence[Segment], granule: int) -> list[Segment]:
        return self._inner.populated(segments, granule)

    def outline(self, segments: Sequence[Segment]) -> Outline:
        return self._inner.outline(segments)

    def close(self) -> None:
        self._inner.close()
