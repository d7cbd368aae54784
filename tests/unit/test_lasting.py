"""What the kernel's khugepaged will do to what was made or trimmed."""

from __future__ import annotations

import numpy as np
import pytest

from fakes import FakeSpace, page_runs
from mthp.engine.lasting import remade
from mthp.geometry import X86_64
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
