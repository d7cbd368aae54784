"""Memory outside of whole PMD ranges of its mapping, batch by batch, beside a visit that goes over whole ranges.

Only the mover collapses it. It is planned by the same policy arithmetic as whole ranges, and read again before each
batch, because the target goes on writing.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from mthp.addrspace import AddressSpace
from mthp.blockstates import states_of
from mthp.engine.admission import Admit, Candidate, collapse_batch
from mthp.engine.planning import plan_parts
from mthp.engine.select import PlanOptions
from mthp.engine.visited import Passage
from mthp.means import Means
from mthp.ptes import Block, segments_of
from mthp.results import BlockOutcome, ScanResult

BATCH = 16
"""Most blocks in a batch: the mover turns on the switch of their size for it, and nothing else is done meanwhile."""


class SmallBlocks:
    """The blocks to make in such memory of one address space.

    Args:
        space: the address space.
        means: bounds on the cost for the target; the mechanism is the mover.
        admit: called before each attempt.

    Attributes:
        touching: whether memory of the space is being moved at this moment.
    """

    def __init__(self, space: AddressSpace, means: Means, admit: Admit) -> None:
        self.touching = False
        self._space, self._admit = space, admit
        self._means = dataclasses.replace(means, mechanism="move")
        self._blocks: list[Block] = []

    @property
    def left(self) -> int:
        """Number of blocks that are left."""
        return len(self._blocks)

    def plan(self, choice: PlanOptions) -> None:
        """Choose the blocks: the largest first, of one order the fullest, then by ascending address."""
        folios = plan_parts(self._space, choice)
        ranked = folios[np.lexsort((folios.address, folios.filled, -folios.order.astype(np.int16)))]
        self._blocks = list(zip(ranked.address.tolist(), ranked.order.tolist(), strict=True))
        self._blocks.reverse()

    def drop(self) -> None:
        """Leave the rest of the blocks alone."""
        self._blocks.clear()

    def batch(self, most_bytes: int) -> Passage:
        """Make the next blocks of one order, at least one and otherwise of `most_bytes` at most.

        Returns:
            A passage without PMD ranges.

        Raises:
            MthpError: as :meth:`mthp.addrspace.AddressSpace.collapse_blocks`.
        """
        order = self._blocks[-1][1]
        count = max(1, min(BATCH, most_bytes // self._space.geometry.size_of(order)))
        blocks: list[Block] = []
        while self._blocks and self._blocks[-1][1] == order and len(blocks) < count:
            blocks.append(self._blocks.pop())
        columns = self._space.read(segments_of(blocks, self._space.geometry.page_size))
        before = states_of(columns, blocks, self._space.geometry)
        tried: list[Block] = []
        for index, (address, _) in enumerate(blocks):
            contents = int(before.contents[index])
            # It went away, or became large, since it was planned.
            if before.large[index] or not contents:
                continue
            filled, swapped = (1 << order) - contents, int(before.swapped[index])
            candidate = Candidate(self._space, address, order, contents, filled, swapped)
            if self._admit(candidate) is ScanResult.SUCCEED:
                tried.append((address, order))
        attempts: list[BlockOutcome] = []
        if tried:
            self.touching = True
            try:
                attempts = collapse_batch(self._space, tried, self._means, columns)
            finally:
                self.touching = False
        if attempts and all(attempt.everywhere for attempt in attempts):
            # A refusal of the whole process holds for every later block, too.
            self.drop()
        nothing = np.empty(0, np.uint64)
        return Passage(
            end=0,
            progress=len(columns.state),
            addresses=nothing,
            results=np.empty(0, np.int8),
            result=ScanResult.SUCCEED,
            released=bool(tried),
            attempts=tuple(attempts),
        )
