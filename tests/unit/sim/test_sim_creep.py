"""Creep: with room to fill, small folios grow scan by scan where the policy forgets what it filled.

A collapse makes pages where none were. The next scan takes them for the program's, finds the run around them fuller
than it was, and fills that. Here it is seen folio by folio on the simulated machine, and not under `mainline`, which
fills small runs wholly or not at all.
"""

from __future__ import annotations

from itertools import combinations, groupby

import numpy as np
import pytest

import mthp
from mthp.engine.policy import Limits, Mainline, Policy, Rules
from mthp.geometry import X86_64, Geometry
from mthp.sim import Machine
from mthp.sim.address_space.access import Fault
from mthp.sim.mm import HUGEPAGE, Mm
from mthp.tunables import Switches, Tunables
from simcheck import check

SIXTEEN = Geometry("16-ptes", 4096, 4)


class Program:
    """A process that has written some pages of one PMD range, before any folio size was enabled."""

    def __init__(self, geometry: Geometry, policy: str | Policy, used: list[int], none: int, chunk: int = 3) -> None:
        self.geometry, self.used = geometry, used
        n = geometry.ptes_per_pmd
        self.machine = Machine(
            geometry,
            node_frames=[8 * n],
            switches=Switches("never"),
            tunables=Tunables(none, n // 8, n // 2, 8 * n),
            policy=policy,
            mthp_min_order=chunk,
        )
        self.mm: Mm = self.machine.create_mm()
        self.start = geometry.pmd_size
        self.machine.map(self.mm, self.start, 2 * geometry.pmd_size, flags={HUGEPAGE})
        for page in used:
            assert self.machine.write(self.mm, self.start + page * geometry.page_size, page + 1) is Fault.DONE
        self.machine.parts.switches = Switches("madvise", dict.fromkeys(geometry.anon_orders, "madvise"))
        self.machine.khugepaged.visit(self.mm)

    def scan(self) -> str:
        """One full scan: the folios afterwards, such as ``"8 1*5 .*3"`` (a folio of 8, 5 small pages, 3 none)."""
        self.machine.khugepaged.full_scan()
        assert check(self.machine) == []
        ptes = self.mm.ptes(self.start, self.geometry.ptes_per_pmd)
        orders = self.machine.parts.memory.order[np.where(ptes.pages(), ptes.value, 0)]
        words = [str(1 << order) if page else "." for order, page in zip(orders.tolist(), ptes.pages(), strict=True)]
        runs = [(word, len(list(run))) for word, run in groupby(words)]
        return " ".join(
            word if word.isdecimal() and count == int(word) else f"{word}*{count // (int(word) if word != '.' else 1)}"
            for word, count in runs
        )

    @property
    def resident(self) -> int:
        return self.mm.anon_pages

    def until_it_rests(self) -> list[str]:
        """Return the state after each scan, until one changes nothing; check that no page of the program is lost."""
        seen = [self.scan()]
        while len(seen) < 2 or seen[-1] != seen[-2]:
            seen.append(self.scan())
        for page in range(self.geometry.ptes_per_pmd):
            address = self.start + page * self.geometry.page_size
            assert self.machine.read(self.mm, address)[1] == (page + 1 if page in self.used else 0)
        return seen[:-1]


class Unscaled(Mainline):
    """Every run may have as many none PTEs as the whole range may."""

    name = "unscaled"

    def limits(self, order: int, rules: Rules) -> Limits:
        return Limits(rules.tunables.max_ptes_none, 0, 0)


SIX_AND_SIX = [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]
"""Twelve of sixteen."""

SEVEN_AND_SIX = [6, *SIX_AND_SIX]

EVERY_OTHER_OF_SIXTEEN = list(range(0, 16, 2))


def test_twelve_of_sixteen_pages_creep_where_the_limit_of_two_holds_for_every_run() -> None:
    """Four none PTEs are more than two; but each half has two, and when both are filled the whole has none."""
    program = Program(SIXTEEN, Unscaled(), SIX_AND_SIX, 2)
    assert program.until_it_rests() == ["8*2", "16"]
    assert (len(program.used), program.resident) == (12, 16)


@pytest.mark.parametrize("chunk", [2, 3])
def test_rfc_creeps_over_sixteen_pages(chunk: int) -> None:
    """Two of sixteen may be none, and one of eight. Three are: too many, until the half with one is filled."""
    program = Program(SIXTEEN, "rfc", SEVEN_AND_SIX, 2, chunk)
    assert program.until_it_rests() == ["8 1*6 .*2", "16"]
    assert program.resident == 16


def test_per_order_creeps_over_sixteen_pages() -> None:
    program = Program(SIXTEEN, "per-order", SEVEN_AND_SIX, 2)
    assert program.until_it_rests() == ["8 4 1*2 .*2", "16"]
    assert program.resident == 16


@pytest.mark.parametrize("used", [SIX_AND_SIX, SEVEN_AND_SIX], ids=len)
def test_mainline_does_not_creep_over_sixteen_pages(used: list[int]) -> None:
    program = Program(SIXTEEN, "mainline", used, 2)
    rests = program.until_it_rests()
    assert len(rests) == 1
    assert program.resident == len(used)


@pytest.mark.parametrize("policy", ["rfc", "per-order"])
def test_with_scaled_limits_no_twelve_of_sixteen_pages_creep(policy: str) -> None:
    """All 1820 arrangements: one of eight may be filled, none of four; two more pages at most, and never in both."""
    present = np.zeros((1820, 16), np.uint8)
    for row, used in enumerate(combinations(range(16), 12)):
        present[row, list(used)] = 1
    first = mthp.plan_ranges(present, policy=policy, max_ptes_none=2, mthp_min_order=2)
    then, orders = first.orders >= 0, first.orders
    second = mthp.plan_ranges(then, folio_order=orders, policy=policy, max_ptes_none=2, mthp_min_order=2)
    assert first.filled.max() == 1
    assert not second.filled.any()


@pytest.mark.parametrize("policy", ["rfc", "per-order"])
def test_eight_pages_creep_to_2m(policy: str) -> None:
    """Half may be none: eight of sixteen pages become a folio, of which the next scan makes one twice as large."""
    program = Program(X86_64, policy, EVERY_OTHER_OF_SIXTEEN, 256)
    grown = [f"{size} .*{512 - size}" for size in (16, 32, 64, 128, 256)]
    assert program.until_it_rests() == [*grown, "512"]
    assert program.resident == 512


@pytest.mark.parametrize(
    ("policy", "scans", "resident"), [("mainline", ["1 .*1 " * 7 + "1 .*497"], 8), ("no-creep", ["16 .*496"], 16)]
)
def test_eight_pages_do_not_creep(policy: str, scans: list[str], resident: int) -> None:
    program = Program(X86_64, policy, EVERY_OTHER_OF_SIXTEEN, 256)
    found = program.until_it_rests()
    assert [scan.replace("1*1", "1") for scan in found] == scans
    assert program.resident == resident


@pytest.mark.parametrize("policy", ["rfc", "per-order"])
def test_memory_that_is_too_sparse_for_2m_creeps_there(policy: str) -> None:
    """160 pages of 512, with at most 256 none: after two scans the whole range is memory."""
    used = [page for page in range(256) if page % 8 < 5]
    program = Program(X86_64, policy, used, 256)
    assert program.until_it_rests()[-1] == "512"
    assert program.resident == 512
    still = Program(X86_64, "mainline", used, 256)
    still.until_it_rests()
    assert still.resident == len(used) == 160
