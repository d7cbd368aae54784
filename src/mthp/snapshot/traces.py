"""Traces of memory accesses, as text that standard tools write: pages used, in order, and when.

``lackey``  ``valgrind --tool=lackey --trace-mem=yes --log-file=FILE PROGRAM``: every load and store. A step is
            :data:`ACCESSES_A_STEP` lines.
``perf``    ``perf script > FILE`` of samples with an address: ``perf mem record``, or ``perf record -d``.
            Addresses of the kernel are left out. A step is one second.
``damon``   ``damo report access --raw_form``, in older versions of damo ``damo report raw``: for every interval the
            number of accesses found in each region. An accessed one counts as used throughout. A step is one interval.

Lines of another form may be the program's own output, or a remark of the tool. They are skipped, and counted.
"""

from __future__ import annotations

import io
import itertools
import os
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray

from mthp.bounded import named
from mthp.errors import UsageError
from mthp.files import open_regular
from mthp.progress import Progress
from mthp.snapshot.bounds import ACCESSES

ACCESSES_A_STEP = 1 << 20
"""Accesses that make one step of a trace without times."""

SECONDS_A_STEP = 1.0

PROBE_LINES = 2000
"""Lines from which the kind of a trace is detected."""

USER_LIMIT = 1 << 63
"""Addresses from here on belong to the kernel, on every architecture."""

REGION_LIMIT = 1 << 46
"""Most bytes of a plausible region of DAMON."""

MOST_DIGITS = 20
"""Digits of a 64-bit number of nanoseconds."""

LINE_LIMIT = 1 << 10
"""Characters of a line; longer ones, such as a program's output, are skipped. The tools write at most 300."""

# Loads, stores, and both; not instruction fetches (I), which use another TLB.
_LACKEY = re.compile(r" [LSM] +([0-9a-f]{1,16}),\d+\s*\Z")
_LACKEY_OTHER = re.compile(r"I  [0-9a-f]+,\d+\s*\Z|==\d+== ")
_PERF = re.compile(
    # A process name ends at a word's end, which keeps the search from trying every character of a long line.
    r"\s*+(?:\S.*?(?<=\S)\s++-?\d++(?:/-?\d++)?\s++(?:\[\d++\]\s++)?)?"
    r"(?P<time>\d{1,15}\.\d{1,15}):\s++(?:(?:\d++\s++)?(?=[\d:]*+[^\s\d:])\S++(?<=:)\s++)?"
    r"(?P<address>[0-9a-f]{1,16})(?:\s|\Z)"
)
_PERF_ADDRESS = re.compile(r"\s+([0-9a-f]{6,16})\s*\Z")
_REGION = re.compile(r"([0-9a-f]{4,16})-([0-9a-f]{4,16})\s*\([^)]*\)(?::\s*(\d+)|\s+-?\d+((?:\s+\d+)*))\s*\Z")
_DAMON_OTHER = re.compile(r"(monitoring_|nr_regions:|target_id:|base_time_absolute:|data source:|# +start_addr)")
_MONITORING_END = re.compile(r"monitoring_end:\s+(.*\S)\s*\Z")
_TIME = re.compile(r"(\d{1,15}(?:\.\d{1,15})?) (h|ms|m|s|us|ns)")
_NANOSECONDS = {"h": 3600e9, "m": 60e9, "s": 1e9, "ms": 1e6, "us": 1e3, "ns": 1.0}

_HOW = (
    "use the output of one of these: valgrind --tool=lackey --trace-mem=yes --log-file=FILE PROGRAM;"
    " perf mem record and then perf script > FILE; damo report access --raw_form > FILE"
)
_BINARY = {
    b"PERFILE2": "perf's own file: make text of it with perf script -i {path} > FILE",
    b"PK": "",
    b"\x1f\x8b": "",
}


@dataclass(frozen=True, slots=True)
class TraceStep:
    """The accesses of one step.

    Attributes:
        seconds: its end, in seconds from the beginning of the trace; without times, the number of the step.
        pages: int64, shape (uses,): page numbers in order, without repetitions in a row.
        accesses: number of lines with its accesses.
    """

    seconds: float
    pages: NDArray[np.int64]
    accesses: int


class Trace:
    """An open trace. Iterating over :meth:`steps` reads it once.

    Args:
        kind: ``lackey``, ``perf`` or ``damon``; detected if None.
        page_size: size of base pages, in bytes.
        at_most: lines of Lackey, or samples of perf, that a step has at most.

    Attributes:
        kind: kind of the trace.
        skipped: number of lines skipped so far.

    Raises:
        UsageError: missing, unreadable, not a trace, or not of that kind.
    """

    def __init__(
        self, path: str | os.PathLike[str], kind: str | None, page_size: int, at_most: int = ACCESSES_A_STEP
    ) -> None:
        self._at_most = at_most
        self.path = os.fspath(path)
        self._page_size = page_size
        self.skipped = 0
        if kind is not None and kind not in KINDS:
            raise UsageError(f"unknown trace format {kind!r}", help=f"use {', '.join(KINDS)}")
        found = _kind_of(self.path)
        if found is None:
            raise UsageError(f"{self.path} is not a trace that mthp knows{_example(self.path)}", help=_HOW)
        if kind is not None and kind != found:
            raise UsageError(
                f"{self.path} is not a trace of the kind {kind!r}, it looks like {found!r}",
                help="leave --trace-format out",
            )
        self.kind = found

    def steps(self, progress: Progress | None = None) -> Iterator[TraceStep]:
        """Yield the steps of the trace that have accesses.

        Raises:
            UsageError: the trace has no access, or cannot be read.
        """
        some = False
        size = Path(self.path).stat().st_size
        try:
            with open_regular(self.path) as raw, io.TextIOWrapper(raw, encoding="ascii", errors="replace") as file:
                for step in KINDS[self.kind](self, _lines(file)):
                    some = True
                    yield step
                    if progress is not None:
                        progress(raw.tell(), size)
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}") from error
        if not some:
            raise UsageError(f"{self.path} has no access to memory of a program", help=_HOW)

    def _lackey(self, file: Iterator[str]) -> Iterator[TraceStep]:
        for number in itertools.count(1):
            addresses, line = array("Q"), ""
            for line in islice(file, self._at_most):
                if not (match := _LACKEY.match(line)):
                    self.skipped += not _LACKEY_OTHER.match(line)
                # Addresses of the kernel, and those that cannot be.
                elif (address := int(match[1], 16)) < USER_LIMIT:
                    addresses.append(address)
            if addresses:
                yield self._step(float(number), addresses)
            if not line:
                return

    def _perf(self, file: Iterator[str]) -> Iterator[TraceStep]:
        begin: float | None = None
        due = SECONDS_A_STEP
        addresses = array("Q")
        for line in file:
            match = _PERF.match(line)
            # Some formats of perf script print the address alone.
            bare = None if match else _PERF_ADDRESS.match(line)
            if match is None and bare is None:
                # Lines of a call chain and empty ones are expected.
                self.skipped += bool(line.strip())
                continue
            at = float(match["time"]) if match else 0.0
            # perf's times count from the boot of the machine.
            begin = at if begin is None else begin
            # A step of too many samples is cut, to bound its memory.
            if (at - begin >= due or len(addresses) >= self._at_most) and addresses:
                yield self._step(due, addresses)
                addresses = array("Q")
                # Seconds without samples have no step of their own.
                due = max(due, (at - begin) // SECONDS_A_STEP * SECONDS_A_STEP) + SECONDS_A_STEP
            address = int(match["address"] if match else bare[1], 16)  # type: ignore[index]
            if 0 < address < USER_LIMIT:
                addresses.append(address)
        if addresses:
            yield self._step(due, addresses)

    def _damon(self, file: Iterator[str]) -> Iterator[TraceStep]:
        seconds = 0.0
        parts: list[NDArray[np.int64]] = []
        regions = pages = 0
        for line in file:
            # It comes before the regions of its interval, so it ends the interval before.
            if match := _MONITORING_END.match(line):
                if parts:
                    yield TraceStep(seconds, np.concatenate(parts), regions)
                    parts, regions, pages = [], 0, 0
                seconds = _nanoseconds(match[1]) / 1e9
            elif match := _REGION.match(line):
                start, end = int(match[1], 16), int(match[2], 16)
                # A number of accesses other than 0, whatever its number of digits.
                hits = (match[3] or match[4] or "").replace("0", "").split()
                if not start < end <= USER_LIMIT or end - start > REGION_LIMIT:
                    self.skipped += 1
                elif hits:
                    span = range(start // self._page_size, -(-end // self._page_size))
                    pages += len(span)
                    with named(self.path):
                        ACCESSES.check(pages)
                    # DAMON samples one page of a region: which others were used is unknown, so all count.
                    parts.append(np.arange(span.start, span.stop))
                    regions += 1
            elif line.strip() and not _DAMON_OTHER.match(line):
                self.skipped += 1
        if parts:
            yield TraceStep(seconds, np.concatenate(parts), regions)

    def _step(self, seconds: float, addresses: array[int]) -> TraceStep:
        pages = (np.frombuffer(addresses, np.uint64) // np.uint64(self._page_size)).astype(np.int64)
        # Repeated uses of one page in a row hit the TLB in any case.
        kept = np.ones(len(pages), np.bool_)
        kept[1:] = pages[1:] != pages[:-1]
        return TraceStep(seconds, pages[kept], len(pages))


def _lines(file: TextIO) -> Iterator[str]:
    """Yield the lines of `file`; instead of too long a line, a short one that is not an access."""
    while line := file.readline(LINE_LIMIT):
        whole = True
        while len(line) == LINE_LIMIT and not line.endswith("\n"):
            whole, line = False, file.readline(LINE_LIMIT) or "\n"
        yield line if whole else "?\n"


KINDS: dict[str, Callable[[Trace, Iterator[str]], Iterator[TraceStep]]] = {
    "lackey": Trace._lackey,
    "perf": Trace._perf,
    "damon": Trace._damon,
}
"""The kinds of traces, by name."""


def _kind_of(path: str) -> str | None:
    """Return the kind of the trace at `path` by its first lines; None if it is not known.

    Raises:
        UsageError: missing, unreadable, or a binary file that must be converted to text first.
    """
    try:
        with open_regular(path) as file:
            begin = file.read(64)
        for magic, what in _BINARY.items():
            if begin.startswith(magic):
                raise UsageError(f"{path} is not text", help=what.format(path=path) or f"unpack it first; {_HOW}")
        with open(path, encoding="ascii", errors="replace") as text:
            lines = list(islice(_lines(text), PROBE_LINES))
    except (OSError, ValueError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{path}: {getattr(error, 'strerror', error)}") from error
    votes = {
        "lackey": sum(1 for line in lines if _LACKEY.match(line) or _LACKEY_OTHER.match(line)),
        "damon": sum(1 for line in lines if _REGION.match(line) or _DAMON_OTHER.match(line)),
        "perf": sum(1 for line in lines if _PERF.match(line) or _PERF_ADDRESS.match(line)),
    }
    best = max(votes, key=lambda kind: votes[kind])
    written = sum(1 for line in lines if line.strip())
    # A quarter of the lines: the output of the program may be in between.
    return best if votes[best] and 4 * votes[best] >= written else None


def _example(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:
        line = next((line.strip() for line in islice(_lines(file), PROBE_LINES) if line.strip()), "")
    return f": its first line is {line[:60]!r}" if line else ": it is empty"


def _nanoseconds(text: str) -> float:
    """Return the nanoseconds in a time of damo, such as ``2 m 19.834 s`` or ``139834000000``."""
    if text.isdecimal():
        return float(text[:MOST_DIGITS])
    return sum(float(number) * _NANOSECONDS[unit] for number, unit in _TIME.findall(text))
