"""Lengths of time as people write them: ``250us``, ``1ms``, ``1.5s``, ``2min``, ``1h``."""

from __future__ import annotations

import re
from fractions import Fraction

from mthp.errors import UsageError

_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(ns|us|ms|s|min|h)\s*")
_NANOSECONDS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "min": 60 * 10**9, "h": 3600 * 10**9}


def parse_duration(text: str) -> int:
    """Nanoseconds of a length of time; a number without a unit is none.

    Raises:
        UsageError: not a number with one of the units.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise UsageError(f"{text!r} is not a duration", help="write it as 250us, 1ms, 10s or 2min")
    return round(Fraction(match[1]) * _NANOSECONDS[match[2]])
