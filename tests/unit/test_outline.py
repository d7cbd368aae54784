"""Outlines: counts and layouts of PMD ranges, against the pages one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeSpace, page_runs
from mthp.geometry import Geometry
from mthp.outline import HUGE, PRESENT, ZERO, outline_of
from mthp.ptes import ORDER_NONE, Pte
from mthp.vma import Vma

SMALL = Geometry("small", 4096, 3)


START = 64 * SMALL.pmd_size


@given(
    kinds=st.lists(st.sampled_from([0, PRESENT, PRESENT | ZERO, PRESENT | HUGE]), min_size=1, max_size=40),
    cuts=st.sets(st.integers(1, 39)),
)
def test_runs_make_up_what_single_pages_do(kinds: list[int], cuts: set[int]) -> None:
    runs: list[list[int]] = []
    for page, kind in enumerate(kinds):
        if not kind:
            continue
        if runs and runs[-1][1] == page and runs[-1][2] == kind and page not in cuts:
            runs[-1][1] = page + 1
        else:
            runs.append([page, page + 1, kind])
    table = np.array(runs, np.uint64).reshape(-1, 3)
    base, size = np.uint64(START), np.uint64(SMALL.page_size)
    found = outline_of(table[:, 0] * size + base, table[:, 1] * size + base, table[:, 2].astype(np.uint8), SMALL)
    n = SMALL.ptes_per_pmd
    blocks = {at: kinds[at : at + n] for at in range(0, len(kinds), n) if any(kinds[at : at + n])}
    assert found.address.tolist() == [START + at * SMALL.page_size for at in blocks]
    assert found.present.tolist() == [sum(bool(k & PRESENT) and not k & ZERO for k in b) for b in blocks.values()]
    assert found.pmd_mapped.tolist() == [all(k & HUGE for k in b if k) for b in blocks.values()]


def space_of(*runs: tuple[int, int, int]) -> FakeSpace:
    state, order = page_runs(*runs)
    vma = Vma(START, START + len(state) * SMALL.page_size, "rw-p", has_anon_vma=True)
    return FakeSpace([(vma, state, order)], geometry=SMALL)


def test_what_an_address_space_holds_is_read_where_nothing_cheaper_tells() -> None:
    huge = Pte.PRESENT | Pte.PMD_MAPPED
    space = space_of((8, 0, ORDER_NONE), (3, Pte.PRESENT, 0), (5, 0, ORDER_NONE), (8, huge, 3), (8, Pte.SWAP, 0))
    whole = [(START, START + 4 * SMALL.pmd_size)]
    outline = space.outline(whole)
    assert ((outline.address - START) // SMALL.pmd_size).tolist() == [1, 2, 3]
    assert outline.present.tolist() == [3, 8, 0]
    assert outline.pmd_mapped.tolist() == [False, True, False]
    assert len(set(outline.layout.tolist())) == 3


def test_a_layout_changes_with_any_page_and_with_no_other_range() -> None:
    space = space_of((8, Pte.PRESENT, 0), (8, Pte.PRESENT, 0), (8, 0, ORDER_NONE))
    whole = [(START, START + 3 * SMALL.pmd_size)]
    before = space.outline(whole).layout
    space.write(START + 9 * SMALL.page_size, 0, ORDER_NONE)
    after = space.outline(whole).layout
    assert (before == after).tolist() == [True, False]
