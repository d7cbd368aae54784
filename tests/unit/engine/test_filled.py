"""The memory of filled pages, and the policy that has one."""

from __future__ import annotations

import numpy as np

import mthp
from fakes import FakeSpace, page_runs
from mthp.engine.filled import FilledPages
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.geometry import X86_64
from mthp.ptes import ORDER_NONE, Pte
from mthp.vma import Vma

BASE = 0x7F00_0000_0000
AT = np.array([BASE, BASE + (2 << 20)], np.uint64)


def bits(*pages: int) -> np.ndarray[tuple[int, int], np.dtype[np.bool_]]:
    plane = np.zeros((2, 512), np.bool_)
    plane.reshape(-1)[list(pages)] = True
    return plane


def test_remembers_what_a_collapse_filled_and_nothing_else() -> None:
    filled = FilledPages(X86_64)
    assert filled.of(AT) is None
    filled.add(AT, before=bits(0, 1), after=bits(0, 1, 2, 3, 600), made=bits(0, 1, 2, 3))
    assert len(filled) == 2
    plane = filled.of(AT)
    assert plane is not None
    assert np.array_equal(plane, bits(2, 3))
    filled.add(AT, before=bits(0, 1, 2, 3), after=bits(0, 1, 2, 3, 4, 5, 6, 7), made=bits(*range(8)))
    assert np.array_equal(filled.of(AT), bits(2, 3, 4, 5, 6, 7))  # type: ignore[arg-type]


def test_forgets_what_was_unmapped() -> None:
    filled = FilledPages(X86_64)
    filled.update(AT, bits(5, 700))
    filled.add(AT, before=bits(), after=bits(5), made=bits())
    assert np.array_equal(filled.of(AT), bits(5))  # type: ignore[arg-type]
    filled.forget([BASE])
    assert len(filled) == 0


def test_only_a_policy_that_remembers_counts_filled_pages_as_none() -> None:
    present = np.zeros((1, 512), np.bool_)
    present[0, :16] = True
    filled = np.zeros_like(present)
    filled[0, 1:16] = True
    orders = np.where(present, np.int8(0), np.int8(ORDER_NONE))
    seen = mthp.plan_ranges(present, policy="no-creep", filled=filled, folio_order=orders, max_ptes_none=256)
    assert len(seen.folios) == 0
    unseen = mthp.plan_ranges(present, policy="per-order", filled=filled, folio_order=orders, max_ptes_none=256)
    assert len(unseen.folios) == 1
    assert unseen.folios.order[0] == 5
    assert int(unseen.copied[0]) == 16


def test_a_plan_of_a_target_sees_the_memory_that_it_is_given() -> None:
    state, order = page_runs((16, int(Pte.PRESENT), 0), (496, 0, ORDER_NONE))
    space = FakeSpace([(Vma(BASE, BASE + (2 << 20), "rw-p"), state, order)])
    filled = FilledPages(X86_64)
    filled.update(AT, bits(*range(1, 16), 20))
    plain = plan_space(space, PlanOptions(policy="no-creep", max_ptes_none=256))
    remembering = plan_space(space, PlanOptions(policy="no-creep", max_ptes_none=256, filled=filled))
    assert plain.folios_by_order == {5: 1}
    assert remembering.folios_by_order == {}
    assert remembering.ranges.resident.tolist() == [16]
