"""The writes for a layout: the work left after each, and that a choice never costs more than equal parts."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from mthp.geometry import GEOMETRIES, X86_64, Geometry
from mthp.linux.split.writes import WRITE_PAGES, Part, SplitWrites

ALL = [X86_64, *GEOMETRIES.values()]


def blocks_of(geometry: Geometry, order: int, share: float, rng: random.Random) -> NDArray[np.int8]:
    """Return a layout in which `share` of the runs of one order are blocks, and the rest base pages."""
    layout = np.zeros(geometry.ptes_per_pmd, np.int8)
    for first in range(0, len(layout), 1 << order):
        if rng.random() < share:
            layout[first : first + (1 << order)] = order
    return layout


def carried_out(layout: NDArray[np.int8], *, offset: bool) -> tuple[int, int]:
    """Carry out all writes on a folio: how many there are, and the pages of the folios that they split."""
    order = len(layout).bit_length() - 1
    orders = np.full(len(layout), order, np.int8)
    steps, todo, writes, pages = SplitWrites(layout, offset=offset), [Part(0, order)], 0, 0
    while todo:
        part = todo.pop()
        assert (orders[part.pages] == part.order).all()
        step = steps.next(part)
        if step is None:
            continue
        writes, pages = writes + 1, pages + (1 << part.order)
        if step.at is None:
            orders[part.pages] = step.apart.order
        else:
            half = part
            while half.order > step.apart.order:
                middle = half.offset + (1 << half.order - 1)
                orders[half.pages] = half.order - 1
                half = Part(middle if part.offset + step.at >= middle else half.offset, half.order - 1)
            assert half == step.apart
        todo += step.left
    assert (orders == layout).all()
    return writes, pages


@pytest.mark.parametrize("geometry", ALL, ids=str)
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.03, 0.3, 0.8, 1.0])
def test_no_choice_costs_more_than_equal_parts_of_the_largest_order(
    geometry: Geometry, offset: bool, share: float
) -> None:
    rng = random.Random(1)
    for _ in range(5):
        order = rng.randint(2, geometry.pmd_order - 1)
        layout = blocks_of(geometry, order, share, rng)
        count = int((layout == order).sum()) >> order
        rest = (len(layout) >> order) - count
        equal = WRITE_PAGES + len(layout) + rest * (WRITE_PAGES + (1 << order)) * bool(count)
        writes, pages = carried_out(layout, offset=offset)
        assert WRITE_PAGES * writes + pages <= equal


def test_a_page_to_split_around_saves_most_writes_where_little_is_made() -> None:
    layout = blocks_of(X86_64, 4, 0.05, random.Random(1))
    with_page, without = (carried_out(layout, offset=offset)[0] for offset in (True, False))
    assert with_page < without < len(layout) >> 4
