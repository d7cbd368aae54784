"""The outline of a live address space, from PAGEMAP_SCAN (Documentation/admin-guide/mm/pagemap.rst).

The kernel walks the page tables and gives runs of pages of the same categories. It neither looks at frames nor changes
anything: no soft-dirty bits are cleared, and no write tracking is set up, which others may be using.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mthp.geometry import Geometry
from mthp.linux import abi
from mthp.linux.pagemap import Pagemap
from mthp.outline import HUGE, PRESENT, SWAP, ZERO, Outline, outline_of
from mthp.ptes import Segment

_KINDS = (
    (abi.PAGE_IS_PRESENT, PRESENT),
    (abi.PAGE_IS_HUGE, HUGE),
    (abi.PAGE_IS_PFNZERO, ZERO),
    (abi.PAGE_IS_SWAPPED, SWAP),
)
_ANY = abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED | abi.PAGE_IS_PFNZERO | abi.PAGE_IS_HUGE


def scan_outline(pagemap: Pagemap, segments: Sequence[Segment], geometry: Geometry) -> Outline:
    """What the PMD ranges of `segments`, which are whole and ascend, hold."""
    regions = [runs for segment in segments for runs in pagemap.scan(segment, any_of=_ANY)]
    if not regions:
        return Outline.joined([])
    runs = np.concatenate(regions)
    kinds = np.zeros(len(runs), np.uint8)
    for category, kind in _KINDS:
        kinds[runs[:, 2] & np.uint64(category) != 0] |= kind
    return outline_of(runs[:, 0], runs[:, 1], kinds, geometry)
