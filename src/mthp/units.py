"""Sizes, durations and shares in text form: one grammar for options, TOML files and the library.

==========  ==========================================  =====================================================
value       written                                     a number without a unit
==========  ==========================================  =====================================================
size        ``64K``, ``64kB``, ``64 KiB``, ``1.5G``      bytes if the caller allows it; else refused
folio size  ``64K``, ``order=4``                        bytes
rate        ``500M``, ``500M/s``                        refused
duration    ``90s``, ``2m``, ``2min``, ``500us``         seconds if the caller allows it; else refused
share       ``20%``, ``0.2``                            a part of 1; a whole number other than 0 is refused
==========  ==========================================  =====================================================

Units of sizes are powers of 1024, as the kernel's are. Shares are at most 100 %. 0 needs no unit.

A TOML value may be a number if a text without a unit is accepted. A refused value raises a
:class:`~mthp.errors.UsageError` that shows how the value was understood, and how to write the intended one.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Literal

from mthp.errors import UsageError

MAX_SIZE = (1 << 63) - 1
"""The largest size, in bytes, because the kernel's offsets are signed 64-bit numbers."""

MAX_DURATION_NS = (1 << 63) - 1
"""The longest duration, in nanoseconds (292 years), because the kernel's times are signed 64-bit numbers."""

_NUMBER = r"([0-9]{1,20}(?:\.[0-9]{1,20})?)"
"""Twenty digits suffice for every allowed number. A number of thousands of digits would take seconds to convert."""

_SIZE = re.compile(rf"\s*{_NUMBER}\s*(?:([KMGTPE])(?:I?B)?|(B))?\s*", re.IGNORECASE)
_ORDER = re.compile(r"\s*order\s*=\s*([0-9]{1,9})\s*", re.IGNORECASE)
_DURATION = re.compile(rf"\s*{_NUMBER}\s*(ns|us|ms|s|min|m|h)?\s*")
_SHARE = re.compile(rf"\s*{_NUMBER}\s*(%)?\s*")

_EXPONENTS = {"B": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}
_NANOSECONDS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "min": 60 * 10**9, "h": 3600 * 10**9}

_SHOWN = 40
"""Characters of a refused value that a message repeats."""


def format_size(size: int) -> str:
    """Return a number of bytes in the unit that makes it shortest: ``"64K"``, ``"1.5G"``, ``"0"``."""
    if size < 0:
        return "-" + format_size(-size)
    if size < 1024:
        return str(size)
    exponent = min((size.bit_length() - 1) // 10, 6)
    scaled = size / (1 << 10 * exponent)
    return f"{scaled:.1f}".removesuffix(".0") + "BKMGTPE"[exponent]


def parse_size(value: object, *, bare: bool = True) -> int:
    """Return the bytes of a size.

    Args:
        value: a text, or an int of bytes.
        bare: whether a number without a unit is bytes. If not, it is refused, because bytes are hardly meant.

    Raises:
        UsageError: `value` is not a number with one of the units, not a whole number of bytes, or above
            :data:`MAX_SIZE`.
    """
    match = _SIZE.fullmatch(_text(value))
    if match is None:
        raise UsageError(f"{_shown(value)} is not a size", help="write it as 64K, 2M or 1.5G")
    number, unit = Fraction(match[1]), (match[2] or match[3] or "").upper()
    if not unit and number and not bare:
        raise UsageError(
            f"{_shown(value)} has no unit: it would be {match[1]} bytes",
            help=f"write {match[1]}M for megabytes, or {match[1]}B for bytes",
        )
    size = number * (1 << 10 * _EXPONENTS[unit or "B"])
    if size.denominator != 1:
        raise UsageError(f"{_shown(value)} is not a whole number of bytes", help="write it as 64K, 2M or 1.5G")
    if size > MAX_SIZE:
        raise UsageError(f"{_shown(value)} is too large", help="the largest size is a byte less than 8E")
    return int(size)


def parse_order_or_size(text: str) -> tuple[int | None, int | None]:
    """Return (order, None) for ``order=4``, and (None, bytes) for ``64K``.

    Raises:
        UsageError: `text` is neither.
    """
    if match := _ORDER.fullmatch(text):
        return int(match[1]), None
    return None, parse_size(text)


def parse_rate(value: object) -> int:
    """Return the bytes per second of ``500M`` or ``500M/s``.

    Raises:
        UsageError: `value` is not a size with a unit, or 0.
    """
    text = _text(value)
    rate = parse_size(re.sub(r"\s*/\s*s\s*$", "", text), bare=False)
    if not rate:
        raise UsageError(f"a rate of {_shown(value)} is not above 0", help="write it as 500M, or leave it out")
    return rate


def parse_duration(value: object, *, bare: Literal["s"] | None = None) -> int:
    """Return the nanoseconds of a duration.

    Args:
        value: a text, or a number of seconds if `bare` allows it.
        bare: the unit of a number without one; None to refuse it.

    Raises:
        UsageError: `value` is not a number with one of the units, or above :data:`MAX_DURATION_NS`.
    """
    match = _DURATION.fullmatch(_text(value))
    if match is None:
        raise UsageError(f"{_shown(value)} is not a duration", help="write it as 250us, 1ms, 10s or 2min")
    number, unit = Fraction(match[1]), match[2] or bare
    if unit is None and number:
        raise UsageError(
            f"{_shown(value)} has no unit: it may be seconds or milliseconds",
            help=f"write {match[1]}s or {match[1]}ms",
        )
    nanoseconds = round(number * _NANOSECONDS[unit or "s"])
    if nanoseconds > MAX_DURATION_NS:
        raise UsageError(f"{_shown(value)} is too long", help="the longest duration is 292 years")
    return nanoseconds


def parse_share(value: object) -> float:
    """Return a share as a part of 1.

    Raises:
        UsageError: `value` is neither a percentage nor a part of 1, or above 100 %.
    """
    if (share := _part(value)) > 1:
        raise UsageError(f"{_shown(value)} is more than 100%", help="write it as 20% or 0.2, up to 100%")
    return float(share)


def parse_factor(value: object) -> float:
    """Return a factor, which is written as a share and may exceed 100 %: ``200%`` or ``2.0`` doubles.

    Raises:
        UsageError: `value` is neither a percentage nor a number with a decimal point.
    """
    return float(_part(value))


def _part(value: object) -> Fraction:
    """Return the number that a percentage or a part of 1 means."""
    match = _SHARE.fullmatch(_text(value))
    if match is None:
        raise UsageError(f"{_shown(value)} is not a share", help="write it as 20% or 0.2")
    number = Fraction(match[1])
    if match[2] is None and number and "." not in match[1]:
        raise UsageError(
            f"{_shown(value)} has no unit: a share is a percentage, or a part of 1 with a decimal point",
            help=_both_shares(match[1], number),
        )
    return number / 100 if match[2] else number


def parse_share_or_size(value: object) -> tuple[float | None, int | None]:
    """Return (share, None) for ``5%`` or ``0.05``, and (None, bytes) for ``64M``.

    Raises:
        UsageError: `value` is neither, or a whole number, which may mean both.
    """
    text = _text(value)
    if match := _SHARE.fullmatch(text):
        if match[2] or "." in match[1]:
            return parse_share(value), None
        if int(match[1]):
            raise UsageError(
                f"{_shown(value)} has no unit: it may be a share or a size",
                help=f"write {match[1]}% for a share, {match[1]}M for megabytes, or {match[1]}B for bytes",
            )
    if _SIZE.fullmatch(text) is None:
        raise UsageError(f"{_shown(value)} is neither a share nor a size", help="write it as 5% or 64M")
    return None, parse_size(value)


def above_zero(value: object, parsed: float) -> None:
    """Refuse a quantity that must not be 0.

    Args:
        value: the value as written.
        parsed: its meaning.

    Raises:
        UsageError: `parsed` is 0.
    """
    if not parsed > 0:
        raise UsageError(f"{_shown(value)} is not above 0", help="use a larger value, or leave it out")


def _text(value: object) -> str:
    """Return `value` as a text; a TOML number has no unit."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return ""
    if isinstance(value, int):
        # Python refuses to convert integers of more than 4300 digits to text.
        return str(value) if -(10**30) < value < 10**30 else ""
    if isinstance(value, float):
        # The grammar has no exponents. NaN and infinity become words, which are refused.
        return repr(value) if "e" not in repr(value) else f"{value:.20f}"
    return ""


def _shown(value: object) -> str:
    """Return `value` as messages repeat it, shortened."""
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "a number of more than 30 digits"
    shown = repr(value)
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def _both_shares(text: str, number: Fraction) -> str:
    """Return the two notations of a share that a whole number may have meant."""
    if number == 1:
        return "write 1% or 100%"
    if number == 100:
        return "write 100%"
    return f"write {text}% or {float(number / 100):g}" if number < 100 else "write it as 20% or 0.2"


def percent(share: float) -> str:
    """Return a share of 1 as a percentage with one decimal."""
    return f"{100 * share:.1f}%"
