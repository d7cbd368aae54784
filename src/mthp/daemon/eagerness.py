"""Eagerness: one number, 0 to 10, that sets the fill limit, the orders, the pace and the trimming.

0 only trims. 10 fills as the kernel does where THP is ``always``, and trims nothing. The number of a rule is the
maximum; the current *level* is below it while memory is short:

- *Pressure* is that of the target's own cgroup (memory.pressure, some avg10). It shows that the target already waits
  for memory, so filling must not take more.
- *Free memory* of the machine shows a shortage before it comes: below a twentieth nothing is made.

Bloat is bounded by it, too: filling may add at most the share of resident memory that may be empty in a PMD range.

A dead band keeps small changes of the measurement from moving the level at all. The wanted level never grows with
pressure, so after a step of pressure the level moves in one direction and stops.

:func:`next_level` and :func:`settings_at` are pure: no clock, no file. :class:`EagernessLevel` has the current level of
one target, and the settings of its rule at that level.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from mthp.budget import Amount
from mthp.daemon.rules import Settings
from mthp.geometry import MIN_ANON_ORDER, Geometry

MOST = 10.0

PRESSURE_BAND = (0.01, 0.10)
"""Shares of time in which some task of the cgroup waits for memory: up to the first the level is not reduced, from the
second on nothing is made. The daemon rests at the second for the whole machine, too (max_memory_pressure).
"""

FREE_BAND = (0.05, 0.20)
"""Available shares of the machine's memory: up to the first nothing is made, from the second on the level is full."""

RISE_PER_SECOND = MOST / 30
"""From 0 to 10 in 30 s, three times the period of avg10."""

DEAD_BAND = 0.5
"""A level rises to this much below the wanted one if that is low, and all the way if that is the rule's number."""

FIRST_BYTES_PER_SECOND = 16 << 20
"""Bytes a second that are collapsed at level 1; each level doubles them, and 10 is unlimited."""


SMALLEST = ((7.0, MIN_ANON_ORDER), (4.0, MIN_ANON_ORDER + 1), (0.0, MIN_ANON_ORDER + 2))
"""Lowest levels, and the smallest order from each of them on.

Below level 4 the smallest folio has 16 pages, because arm64 maps 16 pages of 4K by one TLB entry (CONT_PTES,
arch/arm64/include/asm/pgtable-hwdef.h). Where single pages are missing everywhere, smaller folios are most copying.
"""


@dataclass(frozen=True, slots=True)
class Shortage:
    """How short memory is for a target, as measured.

    Attributes:
        pressure: share of time in which some task of its cgroup waits for memory.
        free: share of the machine's memory that is available.
    """

    pressure: float = 0.0
    free: float = 1.0


@dataclass(frozen=True, slots=True)
class LevelSettings:
    """The settings of a level.

    Attributes:
        makes: whether folios are made at all.
        fill: the share of a PMD range that may be empty, and of the resident memory that filling may add.
        smallest: the smallest order that is made, if the rule has one as large.
        bytes_per_second: bytes collapsed a second at most; None for unlimited.
        trim: the share of zeroes from which a folio is trimmed; None for no trimming.
    """

    makes: bool
    fill: float
    smallest: int
    bytes_per_second: int | None
    trim: float | None


def settings_at(level: float) -> LevelSettings:
    """Return the settings at `level`. All allow more as it grows, and no filled page is trimmed at that level."""
    makes = level >= 1.0
    # Cubed, because the first holes add most of the coverage, and the last ones most of the bloat.
    fill = (level / MOST) ** 3 if makes else 0.0
    # Small folios save the fewest TLB entries for the bytes that they cost to copy, and the pace of a low level is
    # small. The largest order has no bound, because a folio of a full run adds no memory, whatever its order: a bound
    # would lower coverage and save nothing (tests/unit/daemon/test_eagerness_simulated.py).
    smallest = next(order for least, order in SMALLEST if level >= least)
    rate = None if level >= MOST else int(FIRST_BYTES_PER_SECOND * 2 ** max(level - 1.0, 0.0))
    # A collapse fills at most half of the share from which a folio is trimmed, so nothing is trimmed above level 7.
    trim = None if fill > 0.5 else max(0.5, 2 * fill)
    return LevelSettings(makes, fill, smallest, rate, trim)


def large_enough(orders: Iterable[int], smallest: int) -> frozenset[int]:
    """Return those of `orders` that are at least `smallest`; the largest alone if none is."""
    all_orders = frozenset(orders)
    # A rule of small orders alone would make nothing at a low level.
    return frozenset(order for order in all_orders if order >= smallest) or frozenset(sorted(all_orders)[-1:])


def wanted_level(eagerness: float, measured: Shortage) -> float:
    """Return the level that a measurement allows: it falls with pressure, and grows with free memory."""
    low, high = PRESSURE_BAND
    calm = 1.0 - _share(measured.pressure, low, high)
    room = _share(measured.free, *FREE_BAND)
    return eagerness * min(calm, room)


def next_level(level: float, eagerness: float, measured: Shortage, seconds: float) -> float:
    """Return the level `seconds` later, under the measured values: it falls at once, and rises slowly."""
    wanted = wanted_level(eagerness, measured)
    if wanted <= level:
        # At once, because pressure does harm at once.
        return wanted
    # Slowly, because avg10 covers 10 seconds: otherwise the level would be back before the effect of its last fall is
    # visible, and would swing.
    # The band narrows towards the rule's number, so that the level never jumps, however late the measurement recovers.
    # An eagerness of 0 has returned above, because 0 is all that it wants.
    rises_to = wanted - DEAD_BAND * (1 - wanted / eagerness)
    return min(max(level, rises_to), level + RISE_PER_SECOND * seconds)


def _share(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))


MEASURE_SECONDS = 1.0
"""Seconds between two measurements: avg10 is renewed every two seconds (PSI_FREQ, include/linux/psi_types.h)."""


class EagernessLevel:
    """The level of one target.

    Args:
        now: seconds.

    Attributes:
        makes: whether folios are made at this level.
        gives_back: whether even the wanted level makes no folios; False while the level rises from 0.
        smallest: the smallest order that is made; 0 if the rule has no eagerness.
        value: the level, 0 to 10; None if the rule has no eagerness.
    """

    value: float | None

    def __init__(self, rule: Settings, geometry: Geometry, now: float) -> None:
        self.settings = self._rule = rule
        self.makes = True
        self.gives_back = False
        self.smallest = 0
        self.value = None
        self._geometry, self._at = geometry, now
        if rule.eagerness is not None:
            self._set(0.0 if rule.eagerness < MOST else float(MOST))

    def follow(self, now: float, measure: Callable[[], Shortage]) -> bool:
        """Measure again if it is time to; return whether the settings have changed."""
        if self.value is None or self._rule.eagerness is None or now - self._at < MEASURE_SECONDS:
            return False
        found = measure()
        level = next_level(self.value, self._rule.eagerness, found, now - self._at)
        # Not by the level, which is also low while it rises.
        self.gives_back = not settings_at(wanted_level(self._rule.eagerness, found)).makes
        self._at = now
        was = self.settings, self.makes
        self._set(level)
        return was != (self.settings, self.makes)

    def _set(self, level: float) -> None:
        self.value = level
        # In whole steps, because after each change all finished ranges are scanned again.
        at = settings_at(int(level))
        fill = Amount(share=at.fill)
        self.makes, self.smallest = at.makes, at.smallest
        self.settings = replace(
            self._rule,
            max_ptes_none=int(at.fill * (self._geometry.ptes_per_pmd - 1)),
            max_bloat=None if at.fill >= 1 else fill,
            # None is no bound, so the lower of those that there are.
            rate=min(filter(None, (self._rule.rate, at.bytes_per_second)), default=None),
            trim=at.trim,
        )
