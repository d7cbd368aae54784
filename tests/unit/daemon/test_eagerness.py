"""Eagerness: the settings of each level, settling without swinging, and coverage against bloat."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

import mthp
from mthp.daemon.eagerness import (
    DEAD_BAND,
    FREE_BAND,
    MOST,
    PRESSURE_BAND,
    EagernessLevel,
    Shortage,
    large_enough,
    next_level,
    settings_at,
    wanted_level,
)
from mthp.daemon.rules import Settings
from mthp.geometry import MIN_ANON_ORDER, X86_64
from mthp.units import format_size

N = X86_64.ptes_per_pmd


shares = st.floats(0, 1)


levels = st.floats(0, MOST)


@example(0.0, 7.9375)
@given(levels, levels)
def test_all_that_a_level_means_grows_with_it(one: float, other: float) -> None:
    low, high = settings_at(min(one, other)), settings_at(max(one, other))
    assert low.fill <= high.fill
    assert low.makes <= high.makes
    assert low.smallest >= high.smallest
    assert (low.bytes_per_second or math.inf) <= (high.bytes_per_second or math.inf)
    for each in (low, high):
        assert each.trim is None or each.fill <= each.trim / 2 + 1e-9, "nothing that is filled is trimmed"


def test_the_ends_are_trimming_alone_and_what_the_kernel_does() -> None:
    nothing, everything = settings_at(0), settings_at(MOST)
    assert (nothing.makes, nothing.fill, nothing.trim) == (False, 0.0, 0.5)
    assert (everything.fill, everything.bytes_per_second, everything.trim) == (1.0, None, None)
    assert large_enough(range(MIN_ANON_ORDER, 10), everything.smallest) == frozenset(range(MIN_ANON_ORDER, 10))


def stepped(eagerness: int, level: float, before: float, after: float, free: float) -> list[float]:
    """Return the level of each second after the pressure went from one share to another at once.

    avg10 follows exponentially, renewed every two seconds (kernel/sched/psi.c).
    """
    found, average = [], before
    for second in range(90):
        if second % 2 == 0:
            average = after + (average - after) * math.exp(-2 / 10)
        level = next_level(level, eagerness, Shortage(average, free), 1.0)
        found.append(level)
    return found


@example(1, 0.0, 1.0, 0.009765625, 1.0)
@example(10, 0.0, 1.0, 0.0098, 1.0)
@example(10, 0.0, 1.0, 0.0371, 1.0)
@given(st.integers(0, 10), levels, shares, shares, shares)
def test_after_a_step_of_pressure_it_moves_in_one_direction_and_settles_within_a_minute(
    eagerness: int, level: float, before: float, after: float, free: float
) -> None:
    # The level of long ago, and no other than the rule allows.
    for _ in range(90):
        level = next_level(min(level, eagerness), eagerness, Shortage(before, free), 1.0)
    found = [level, *stepped(eagerness, level, before, after, free)]
    changes = np.diff(found)
    assert (changes <= 1e-12).all() or (changes >= -1e-12).all()
    # What avg10 itself still moves after a minute moves the level; nothing else does.
    rest = abs(after - before) * math.exp(-6) / (PRESSURE_BAND[1] - PRESSURE_BAND[0])
    assert max(found[61:]) - min(found[61:]) <= (eagerness + DEAD_BAND) * rest + 1e-9


@given(st.integers(0, 10), levels, shares, shares)
def test_it_is_never_above_the_rule_nor_what_was_measured(
    eagerness: int, level: float, pressure: float, free: float
) -> None:
    now = Shortage(pressure, free)
    assert 0 <= next_level(level, eagerness, now, 1.0) <= max(wanted_level(eagerness, now), 0) + 1e-12 or (
        next_level(level, eagerness, now, 1.0) <= level
    )


def test_coverage_for_bloat_is_nowhere_below_a_fixed_max_ptes_none() -> None:
    """Print both curves: coverage is the share in folios of 64K and more, bloat the filled memory."""
    random = np.random.default_rng(1)
    # Ranges of every fullness, in runs of every length, as allocators leave them.
    rows = []
    for share in random.random(400):
        lengths = 2 ** random.integers(0, 8, N)
        rows.append(np.repeat(random.random(N) < share, lengths)[:N])
    present = np.array(rows)

    def curve(policy: str, orders: str | tuple[int, ...], limit: int) -> tuple[float, float]:
        orders_of = mthp.plan_ranges(present, policy=policy, orders=orders, max_ptes_none=limit).orders
        inside = orders_of >= 4
        return float((inside & ~present).sum() / present.sum()), float((inside & present).sum() / present.sum())

    def eager(level: float) -> tuple[float, float]:
        return curve("mainline", orders_at(level), int(settings_at(level).fill * (N - 1) + 1e-9))

    whole = [eager(level) for level in range(1, 11)]
    for level, (bloat, coverage) in enumerate(whole, 1):
        print(f"eagerness {level:2}: coverage {coverage:.3f} bloat {bloat:.3f}")
    assert (np.diff(whole, axis=0) >= 0).all()
    for limit in (0, 32, 64, 128, 192, 256, 320, 384, 448, 480, 511):
        bloat, coverage = curve("pmd-only", "2M", limit)
        # The point of the curve that adds as much.
        more_bloat, more = eager(max(1.0, MOST * (limit / (N - 1)) ** (1 / 3)))
        print(f"max_ptes_none {limit:3}: coverage {coverage:.3f} bloat {bloat:.3f}, by eagerness {more:.3f}")
        assert more_bloat <= bloat + 1e-12
        assert more >= coverage


def orders_at(level: float) -> tuple[int, ...]:
    """Return the orders of a level, for a rule that allows all."""
    return tuple(sorted(large_enough(X86_64.anon_orders, settings_at(level).smallest)))


def occupancies() -> dict[str, NDArray[np.bool_]]:
    """Which pages of PMD ranges are used, as programs leave them: bool, shape (ranges, pages)."""
    random = np.random.default_rng(1)
    shares = random.random((200, 1))
    runs = [np.repeat(random.random(N) < share, 2 ** random.integers(0, 8, N))[:N] for share in shares]
    return {
        "runs of every length": np.array(runs),
        "single pages": random.random((200, N)) < shares,
        "nearly full": random.random((200, N)) < (1 + shares) / 2,
        "the beginning": np.arange(N) < random.integers(1, N + 1, (200, 1)),
        "every other page": np.tile(np.arange(N) % 2 == 0, (50, 1)),
        "spans of 64K": np.repeat(random.random((200, N // 16)) < shares, 16, axis=1),
    }


@pytest.mark.parametrize("policy", ["mainline", "no-creep"])
@pytest.mark.parametrize("pattern", occupancies())
def test_the_curve_is_nowhere_below_a_fixed_max_ptes_none_with_the_same_orders(policy: str, pattern: str) -> None:
    """Both may make folios of every order; coverage is the share in 64K and more, bloat the filled memory."""
    present = occupancies()[pattern]

    def point(limit: int, orders: str | tuple[int, ...] = "all") -> tuple[float, float]:
        orders_of = mthp.plan_ranges(present, policy=policy, orders=orders, max_ptes_none=limit).orders
        inside = orders_of >= 4
        return float((inside & ~present).sum() / present.sum()), float((inside & present).sum() / present.sum())

    whole = [point(int(settings_at(level).fill * (N - 1) + 1e-9), orders_at(level)) for level in range(1, 11)]
    assert (np.diff(whole, axis=0) >= 0).all()
    bloats, coverages = np.array(whole).T
    for limit in (0, 1, 64, 255, 511):
        bloat, coverage = point(limit)
        between = float(np.interp(bloat, bloats, coverages))
        print(f"{pattern}, max_ptes_none {limit:3}: bloat {bloat:.3f} coverage {coverage:.3f}, by level {between:.3f}")
        assert all(coverage <= made or bloat > added for added, made in whole), "no level is beaten in both"
        # Between two levels. Only whole levels hold, so that finished ranges are not scanned at every step.
        assert between >= coverage - 0.03


@pytest.mark.parametrize("pattern", occupancies())
def test_the_orders_of_a_level_copy_less_and_cover_as_much(pattern: str) -> None:
    """Print the share of the memory that is copied with all orders, and with those of the level."""
    present = occupancies()[pattern]
    for level in range(1, 11):
        limit = int(settings_at(level).fill * (N - 1) + 1e-9)
        plans = [
            mthp.plan_ranges(present, policy="mainline", orders=orders, max_ptes_none=limit)
            for orders in ("all", orders_at(level))
        ]
        covered, copied = zip(
            *(
                (int(((plan.orders >= 4) & present).sum()), float(((plan.orders > 0) & present).sum() / present.sum()))
                for plan in plans
            ),
            strict=True,
        )
        share = covered[0] / present.sum()
        print(
            f"{pattern}, level {level:2}: {share:.1%} in 64K, copied {copied[0]:.1%} of all, {copied[1]:.1%} of these"
        )
        assert covered[0] == covered[1]
        assert copied[1] <= copied[0]
        assert level > 3 or copied[1] == pytest.approx(share), "nothing is copied for less than 64K"


def test_a_rule_of_small_orders_keeps_the_largest_of_them() -> None:
    assert large_enough({2, 3, 4, 9}, 4) == {4, 9}
    assert large_enough({2, 3}, 4) == {3}
    assert large_enough((), 4) == frozenset()
    assert large_enough({2, 9}, 0) == {2, 9}


def test_the_documented_levels_are_those_that_hold() -> None:
    page = (Path(__file__).parents[3] / "docs/how-to/service.md").read_text()
    rows = re.findall(r"^\| (\d+) \| (\d+)% \| (.+?) \| (.+?) \| (.+?) \|$", page, re.M)
    assert [int(row[0]) for row in rows] == list(range(11))
    for level, fill, smallest, rate, trim in rows:
        holds = settings_at(int(level))
        assert smallest == (X86_64.label(holds.smallest) if holds.makes else "none")
        assert int(fill) == round(100 * holds.fill)
        bound = "no bound" if holds.bytes_per_second is None else f"{format_size(holds.bytes_per_second)}/s"
        assert rate == (bound if holds.makes else "nothing")
        assert trim == ("no" if holds.trim is None else f"{holds.trim:.0%}")


def test_a_level_sets_what_a_rule_does_not_say() -> None:
    level = EagernessLevel(Settings(eagerness=5), X86_64, 0.0)
    assert (level.makes, level.value) == (False, 0.0)
    assert not level.follow(0.5, Shortage)
    assert level.follow(30.0, Shortage)
    assert level.settings.max_ptes_none == int(0.125 * (N - 1))
    assert level.settings.trim == 0.5
    assert X86_64.label(level.smallest) == "32K"
    assert level.follow(31.0, lambda: Shortage(pressure=0.5))
    assert not level.makes
    without = EagernessLevel(Settings(), X86_64, 0.0)
    assert not without.follow(100.0, lambda: pytest.fail("nothing is measured"))
    assert without.settings == Settings()
    assert without.smallest == 0


def test_the_shorter_of_calm_and_room_decides_and_the_last_step_to_the_rule_is_taken() -> None:
    half = Shortage(sum(PRESSURE_BAND) / 2, sum(FREE_BAND) / 2)
    assert wanted_level(10, half) == pytest.approx(5.0)
    assert next_level(9.7, 10, Shortage(), 1.0) == 10.0
