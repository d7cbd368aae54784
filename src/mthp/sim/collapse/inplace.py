"""In-place splits in one address space, down to planned orders or to trim folios, as mthp makes them in processes."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from mthp.ptes import Block
from mthp.sim.address_space.advice import madvise
from mthp.sim.mm import Mm
from mthp.sim.page_tables.split import split_huge_pages
from mthp.sim.parts import Parts
from mthp.trimming import TrimBy, in_use


def divide(
    parts: Parts, mm: Mm, folio: Block, head: int, layout: NDArray[np.int8], calls_ns: list[int]
) -> list[tuple[int, int]]:
    """Split a folio down to the orders of `layout`, the largest parts first.

    Args:
        folio: address and order of the folio.
        head: first frame of the folio.
        layout: int8, shape (pages,): order of the folio that each page is to lie in.
        calls_ns: list to which the simulated nanoseconds of each write are appended.

    Returns:
        (first page in the folio, order) of each part that could not be split.
    """
    page, refused = parts.geometry.page_size, []
    todo = [(0, folio[1])]
    while todo:
        first, order = todo.pop()
        largest = int(layout[first : first + (1 << order)].max())
        if largest == order:
            continue
        # One page is enough. Linux 6.18 needs a write for each PMD entry that maps the folio.
        begin = folio[0] + first * page
        for _ in range(len(parts.mms)):
            began = parts.clock.now_ns
            split_huge_pages(parts, f"{mm.id},{begin:#x},{begin + page:#x},{largest}")
            calls_ns.append(parts.clock.now_ns - began)
            # A write succeeds also where it skipped the folio.
            if parts.memory.order[head + first] <= largest:
                break
        else:
            refused.append((first, order))
            continue
        # Base pages cannot be split further.
        todo += [(part, largest) for part in range(first, first + (1 << order), 1 << largest) if largest]
    return refused


def trim_folio(parts: Parts, mm: Mm, folio: Block, head: int, zero: NDArray[np.bool_], by: TrimBy) -> tuple[int, int]:
    """Split a folio to free its pages of zeroes; return (errno or 0, simulated nanoseconds).

    Args:
        folio, head: as for :func:`divide`.
        zero: bool, shape (pages,): pages that contain only zeroes, at least one.
    """
    began, error, page = parts.clock.now_ns, 0, parts.geometry.page_size
    if by == "split":
        divide(parts, mm, folio, head, in_use(zero, page), [])
    else:
        at = folio[0] + int(zero.argmax()) * page
        error = madvise(parts, mm, at, at + page, "COLD")
    return error, parts.clock.now_ns - began
