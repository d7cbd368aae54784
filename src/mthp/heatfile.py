"""Heat in a file of CSV or JSON lines from a profiler; ``docs/how-to/heat.md`` converts other output.

CSV has the columns ``start,end,accesses``, and may begin with a line of these words. JSON has one object a line, with
these keys. Addresses are decimal, or hexadecimal with ``0x``; in JSON they may be numbers. The end is the address
behind the span. Empty lines and lines that begin with ``#`` are skipped. Spans may overlap, and have any order.
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import numpy as np

from mthp.bounded import Bound, named, parse_json, read_small
from mthp.errors import UsageError
from mthp.heat import Heat
from mthp.ptes import LARGEST_ADDRESS

HEAT_BYTES = Bound(64 << 20, "bytes of heat")
"""The most bytes; a line takes some 40."""

HEAT_SPANS = Bound(1 << 20, "spans of heat")
"""The most spans: half a million PMD ranges of x86-64, which are 1 TiB, each cut in two."""

LINE_BYTES = Bound(1 << 10, "bytes of one line")

MOST_ACCESSES = float(1 << 62)

KEYS = ("start", "end", "accesses")

_ADDRESS = re.compile(r"0x[0-9a-f]{1,16}|[0-9]{1,20}", re.IGNORECASE)
_COUNT = re.compile(r"[0-9]{1,20}(?:\.[0-9]{1,20})?(?:e[+-]?[0-9]{1,3})?", re.IGNORECASE)

_HELP = "write lines of start,end,accesses, or JSON objects with these keys; see docs/how-to/heat.md"


def read_heat(path: str | os.PathLike[str]) -> Heat:
    """Return the heat in the file at `path`.

    Raises:
        UsageError: the file cannot be read, is too large, or has a line that is not a span.
    """
    try:
        data = read_small(path, HEAT_BYTES)
    except UsageError as error:
        # Whatever is not a time is taken for a path, also a time that is written wrongly.
        raise UsageError(
            error.message, help=error.help or "name a file of start,end,accesses, or a time such as 5s or damon:5s"
        ) from error
    with named(path):
        lines = data.split(b"\n")
        HEAT_SPANS.check(sum(1 for line in lines if line.strip() and not line.startswith(b"#")))
        spans = [span for number, line in enumerate(lines, 1) if (span := _span(line.strip(), number)) is not None]
        if not spans:
            raise UsageError("no heat in it: it has no line with a span", help=_HELP)
    start, end = (np.array([span[index] for span in spans], np.uint64) for index in (0, 1))
    accesses = np.array([span[2] for span in spans], np.float64)
    return Heat.of_spans(start, end, accesses, source=f"file {Path(path).name}")


def _span(line: bytes, number: int) -> tuple[int, int, float] | None:
    """Return the span in a line; None for an empty line, a comment and the header."""
    if not line or line.startswith(b"#"):
        return None
    try:
        LINE_BYTES.check(len(line))
        text = line.decode("ascii")
        if number == 1 and text.replace(" ", "").lower() == ",".join(KEYS):
            return None
        start, end, accesses = _from_json(text) if text.startswith("{") else _from_csv(text)
    except (UsageError, ValueError) as error:
        shown = error.message if isinstance(error, UsageError) else "not a span"
        raise UsageError(f"line {number}: {shown}: {_shown(line)}", help=_HELP) from None
    if not 0 <= start < end <= LARGEST_ADDRESS:
        raise UsageError(
            f"line {number}: not a span of addresses, which ends behind its start: {_shown(line)}", help=_HELP
        )
    if not (math.isfinite(accesses) and 0 <= accesses <= MOST_ACCESSES):
        raise UsageError(f"line {number}: accesses are not a count: {_shown(line)}", help=_HELP)
    return start, end, accesses


def _from_csv(text: str) -> tuple[int, int, float]:
    start, end, accesses = (word.strip() for word in text.split(","))
    return _address(start), _address(end), _count(accesses)


def _from_json(text: str) -> tuple[int, int, float]:
    value = parse_json(text)
    if not isinstance(value, dict) or not value.keys() >= set(KEYS):
        raise UsageError(f"not an object with {', '.join(KEYS)}")
    start, end, accesses = (value[key] for key in KEYS)
    if isinstance(accesses, bool) or not isinstance(accesses, int | float):
        raise UsageError("accesses are not a number")
    return _address(start), _address(end), float(accesses)


def _address(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if not isinstance(value, str) or not _ADDRESS.fullmatch(value):
        raise UsageError("not an address")
    return int(value, 16 if value[:2].lower() == "0x" else 10)


def _count(text: str) -> float:
    if not _COUNT.fullmatch(text):
        raise UsageError("accesses are not a count")
    return float(text)


def _shown(line: bytes) -> str:
    """Return the beginning of a line, fit to be printed."""
    return repr(line[:40])[1:]
