"""The accesses for which the model of the TLB counts page walks: a recorded trace, or drawn by heat."""

from __future__ import annotations

import numpy as np

from mthp.abilities import Accesses, accesses
from mthp.addrspace import AddressSpace
from mthp.engine.select import PORTION_PMD_RANGES
from mthp.heat import Heat
from mthp.ptes import Pte, in_portions

DRAWN = 1 << 19
"""Number of accesses drawn: each page of a gigabyte twice."""


def accesses_to_count(space: AddressSpace, heat: Heat | None) -> Accesses | None:
    """Return the trace that `space` was recorded from, without one random accesses by `heat`, and None without heat.

    Raises:
        TargetVanishedError: the process exited in the meantime.
    """
    trace = accesses(space)
    return drawn_by(space, heat) if trace is None and heat is not None and heat.spans else trace


def drawn_by(space: AddressSpace, heat: Heat, seed: int = 0) -> Accesses:
    """Return random accesses to present pages of `space`, as often as `heat` says.

    Heat does not have the order: a program that goes through its memory in turn misses the TLB less often.

    Raises:
        TargetVanishedError: the process exited in the meantime.
    """
    rng, page, size = np.random.default_rng(seed), space.geometry.page_size, space.geometry.pmd_size
    span = rng.choice(heat.spans, DRAWN, p=heat.accesses / heat.total)
    inside = rng.random(DRAWN) * (heat.end - heat.start)[span].astype(np.float64)
    address = heat.start[span] + inside.astype(np.uint64)
    pages = (address // np.uint64(page)).astype(np.int64)
    ranges = np.unique(pages * page // size) * size
    there = np.zeros(DRAWN, np.bool_)
    for portion in in_portions([(start, start + size) for start in ranges.tolist()], PORTION_PMD_RANGES * size):
        columns = space.read(portion)
        numbers = np.concatenate([np.arange(start // page, end // page) for start, end in portion])
        # Spans of heat have holes, and a program does not access pages that are not present.
        present = numbers[columns.has(Pte.PRESENT)]
        there |= np.isin(pages, present)
    drawn = pages[there]
    # Called once for each setting that is replayed.
    return lambda: [drawn]
