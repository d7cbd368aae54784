"""The current level of eagerness of a target, and the settings of its rule at that level."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mthp.budget import Amount
from mthp.daemon.eagerness import MOST, Measured, next_level, settings_at, wanted_level
from mthp.daemon.rules import Settings
from mthp.geometry import Geometry

MEASURE_SECONDS = 1.0
"""Seconds between two measurements: avg10 is renewed every two seconds (PSI_FREQ, include/linux/psi_types.h)."""


class Level:
    """The level of one target.

    Args:
        rule: the settings of its rule.
        now: seconds.

    Attributes:
        settings: the current settings.
        makes: whether folios are made at this level.
        gives_back: whether even the wanted level makes no folios; False while the level rises from 0.
        value: the level, 0 to 10; None if the rule has no eagerness.
    """

    value: float | None

    def __init__(self, rule: Settings, geometry: Geometry, now: float) -> None:
        self.settings = self._rule = rule
        self.makes = True
        self.gives_back = False
        self.value = None
        self._geometry, self._at = geometry, now
        if rule.eagerness is not None:
            self._set(0.0 if rule.eagerness < MOST else float(MOST))

    def follow(self, now: float, measure: Callable[[], Measured]) -> bool:
        """Measure again if it is time to; return whether the settings have changed."""
        if self.value is None or self._rule.eagerness is None or now - self._at < MEASURE_SECONDS:
            return False
        found = measure()
        level = next_level(self.value, self._rule.eagerness, found, now - self._at)
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
        self.makes = at.makes
        self.settings = replace(
            self._rule,
            max_ptes_none=int(at.fill * (self._geometry.ptes_per_pmd - 1)),
            max_bloat=None if at.fill >= 1 else fill,
            rate=min(filter(None, (self._rule.rate, at.bytes_per_second)), default=None),
            trim=at.trim,
        )
