"""Comparisons with splits and trims, against the simulated machine with the same memory."""

from __future__ import annotations

import numpy as np
import pytest

from mthp.abilities import resident_bytes
from mthp.engine.collapse import collapse_space
from mthp.engine.select import PlanOptions
from mthp.engine.trim import TrimOptions, trim_space
from mthp.errors import UsageError
from mthp.lab.compare import compare, settings_of
from mthp.lab.evaluate import evaluate, resident_by_splitting
from mthp.means import Means
from mthp.sim import Machine, SimSpace


def space_with(chance: np.random.Generator, full: float, zeroes: float = 0.3) -> SimSpace:
    """Four PMD ranges of holes, pages of zeroes, and contents, in blocks of 64K and strewn."""
    machine = Machine()
    mm, start, page, n = machine.create_mm(), machine.geometry.pmd_size, machine.geometry.page_size, 4 * 512
    machine.map(mm, start, start + n * page)
    there = (chance.random(n) < full) | np.repeat(chance.random(n // 16) < full, 16)
    pages = start + np.flatnonzero(there) * page
    machine.touch(mm, pages, contents=(chance.random(len(pages)) >= zeroes).astype(np.uint32))
    return machine.space(mm)


@pytest.mark.parametrize("policy", ["mainline", "no-creep", "per-order"])
@pytest.mark.parametrize(("full", "max_ptes_none"), [(0.2, 0), (0.5, 64), (0.8, 511)])
def test_resident_memory_is_predicted_to_the_page(policy: str, full: float, max_ptes_none: int) -> None:
    for seed in range(5):
        space = space_with(np.random.default_rng(seed), full)
        choice = PlanOptions(f"{policy}:split", orders=(4, 6, 9), max_ptes_none=max_ptes_none)
        [outcome] = evaluate(space, [choice], contents=True)
        after = outcome.rows()[-1]

        report = collapse_space(
            space, PlanOptions(policy, orders=(4, 6, 9), max_ptes_none=max_ptes_none), Means(max_bloat=None)
        )

        page = space.geometry.page_size
        assert not any(tally.left for tally in (report.ranges, *report.folios.values()))
        assert report.after.resident * page == after["resident_bytes"]
        assert report.filled_bytes == after["bloat_bytes"]
        assert sum(tally.made for tally in report.folios.values()) + report.ranges.made == after["folios"]
        assert trim_space(space, TrimOptions()).given_back_bytes == after["given_back_bytes"]


@pytest.mark.parametrize("zeroes", [0, 0.3])
def test_a_plan_says_what_will_be_resident(zeroes: float) -> None:
    for seed in range(5):
        space, choice = (
            space_with(np.random.default_rng(seed), 0.5, zeroes),
            PlanOptions(orders="64K", max_ptes_none=64),
        )
        most = resident_by_splitting(space, choice)
        report = collapse_space(space, choice, Means(max_bloat=None))
        assert report.folios[4].made
        after = resident_bytes(space)
        assert after == most if not zeroes else after < most


def test_by_splitting_a_range_is_copied_as_a_whole_and_costs_more() -> None:
    space = space_with(np.random.default_rng(1), 0.3)
    alone, split = (
        outcome.rows()[-1]
        for outcome in evaluate(space, settings_of(["mainline", "mainline:split"], max_ptes_none=[0], orders=("64K",)))
    )
    assert split["folios"] == alone["folios"] > 0
    assert split["bloat_bytes"] == alone["bloat_bytes"]
    assert split["copied_bytes"] > alone["copied_bytes"]


def test_settings_are_named_by_what_makes_the_folios() -> None:
    space = space_with(np.random.default_rng(2), 0.5)
    assert compare(space, settings_of(["mainline", "mainline:split"])).names == ["mainline", "mainline:split"]
    with pytest.raises(UsageError, match="mainline:magic"):
        compare(space, settings_of(["mainline:magic"]))
