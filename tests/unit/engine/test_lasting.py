"""Effects of the kernel's khugepaged on folios that were made or trimmed."""

from __future__ import annotations

import numpy as np
import pytest

from fakes import FakeSpace, page_runs
from mthp.engine.lasting import lasting_on, remade, remade_of_plan
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.geometry import X86_64
from mthp.ptes import ORDER_NONE
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma

BASE, PMD, N = 1 << 40, X86_64.pmd_size, X86_64.ptes_per_pmd


def space(*, top: str = "always", size: str = "inherit", max_ptes_none: int = 511, flags: str = "") -> FakeSpace:
    vma = Vma(BASE, BASE + 3 * PMD, "rw-p", flags=frozenset(flags.split()), has_anon_vma=True)
    return FakeSpace(
        [(vma, *page_runs((3 * N, 1, 0)))],
        switches=Switches(top, {9: size}),
        tunables=Tunables(max_ptes_none, 64, 256, 4096),
    )


@pytest.mark.parametrize(
    ("options", "ranges", "keeps"),
    [
        ({}, 3, 99),
        ({"max_ptes_none": 150}, 1, 99),
        ({"max_ptes_none": 99}, 0, None),
        ({"top": "never"}, 0, None),
        ({"top": "madvise"}, 0, None),
        ({"top": "madvise", "flags": "hg"}, 3, 99),
        ({"flags": "nh"}, 0, None),
        ({"size": "never"}, 0, None),
    ],
)
def test_what_khugepaged_makes_huge_again(options: dict[str, str], ranges: int, keeps: int | None) -> None:
    addresses = np.arange(BASE, BASE + 4 * PMD, PMD, dtype=np.uint64)
    found = remade(space(**options), addresses, np.array([200, 100, 400, 0]))  # type: ignore[arg-type]
    assert (found.ranges, found.keeps) == (ranges, keeps)
    assert bool(found.remark) == bool(ranges)


def test_full_ranges_cannot_be_kept_by_the_tunable() -> None:
    found = remade(space(), np.array([BASE], np.uint64), np.array([0]))
    assert (found.ranges, found.keeps) == (1, None)
    assert "MADV_NOHUGEPAGE" in found.remark


@pytest.mark.parametrize(("orders", "ranges"), [("64K", 2), ("2M", 0)])
def test_small_folios_of_a_plan_do_not_last_where_the_tunable_lets_holes_be_filled(orders: str, ranges: int) -> None:
    # A block of 64 KiB in each of two PMD ranges; the third is empty.
    vma = Vma(BASE, BASE + 3 * PMD, "rw-p", has_anon_vma=True)
    runs = [run for _ in range(2) for run in ((16, 1, 0), (N - 16, 0, ORDER_NONE))]
    space = FakeSpace([(vma, *page_runs(*runs, (N, 0, ORDER_NONE)))], switches=Switches("always", {9: "inherit"}))
    plan = plan_space(space, PlanOptions(orders=orders, max_ptes_none=0))
    found = remade_of_plan(space, plan)
    assert (found.ranges, found.keeps) == (ranges, N - 16 - 1 if ranges else None)


@pytest.mark.parametrize(
    ("top", "max_ptes_none", "says", "remedy"),
    [
        ("never", 511, "leaves them as they are", False),
        ("madvise", 511, "with MADV_HUGEPAGE", True),
        ("always", 511, "in every process", True),
        ("always", 0, "full PMD ranges only", False),
    ],
)
def test_what_a_machine_does_to_small_folios_is_said_with_the_remedy(
    top: str, max_ptes_none: int, says: str, remedy: bool
) -> None:
    tunables = Tunables(max_ptes_none, 64, 256, 4096)
    what, how = lasting_on(Switches(top, {9: "inherit"}), tunables, X86_64)
    assert says in what
    assert ("max_ptes_none" in how) == remedy


def test_what_a_plan_fills_is_not_empty_for_khugepaged() -> None:
    vma = Vma(BASE, BASE + PMD, "rw-p", has_anon_vma=True)
    space = FakeSpace(
        [(vma, *page_runs((12, 1, 0), (N - 12, 0, ORDER_NONE)))], switches=Switches("always", {9: "inherit"})
    )
    plan = plan_space(space, PlanOptions(policy="per-order", orders="64K", max_ptes_none=255))
    assert plan.folios.filled.tolist() == [4]
    found = remade_of_plan(space, plan)
    assert (found.ranges, found.keeps) == (1, N - 16 - 1)
