"""Rows of results from a file, checked for what their readers need."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from mthp.errors import UsageError
from mthp.lab.figures import Row

MOST_SCANS = 1000
"""The most scans of one setting; a grid and `mthp compare` allow no more."""

MOST = 1 << 63
"""A bound on figures: bytes of a machine and seconds fit 63 bits."""

MOST_TEXT = 1 << 13
"""The most characters of a text."""


def checked_rows(rows: object, columns: Mapping[str, type]) -> list[Row]:
    """Return `rows` if each is an object with all `columns`, with values to print and to compute with.

    Args:
        columns: names and types of required columns: ``int``, ``float`` (which includes int) or ``str``.

    Raises:
        UsageError: a value is missing or of the wrong kind.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not all(isinstance(row, dict) for row in rows):
        raise UsageError("damaged: its rows are not a list of objects")
    for row in rows:
        for name, kind in columns.items():
            value = row.get(name)
            # In Python, a bool is an int.
            if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
                raise _damaged(name)
        for name, value in row.items():
            if not _sensible(name, value):
                raise _damaged(name)
    return list(rows)


def _sensible(name: str, value: object) -> bool:
    if name.startswith("order_share_"):
        # Readers compute with the number behind it.
        if not re.fullmatch(r"order_share_[0-9]{1,2}", name):
            return False
        return value is None or (isinstance(value, int | float) and 0 <= value <= 1)
    if isinstance(value, str):
        return len(value) <= MOST_TEXT
    if isinstance(value, int | float):
        return math.isfinite(value) and abs(value) < (MOST_SCANS + 1 if name == "scan" else MOST)
    return value is None


def _damaged(name: str) -> UsageError:
    return UsageError(f"damaged: {str(name)[:40]!r} of a row is missing or not valid")
