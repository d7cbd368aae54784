"""Heat: the memory that a program uses, as accesses seen by span of addresses.

Every source counts in its own unit: DAMON samples, idle pages, samples of a profiler. So only numbers of one
:class:`Heat` can be compared. The worth of a collapse is the accesses to a block, times the TLB entries that it saves,
for each byte that it copies (:func:`worth`).
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast, get_args

import numpy as np
from numpy.typing import NDArray

from mthp.errors import UsageError
from mthp.units import above_zero, parse_duration

Source = Literal["auto", "damon", "idle", "young"]
"""The source of a measurement; ``auto`` is the best of the others that this machine has."""

LONGEST = 600.0
"""The longest measurement, in seconds: its kdamond, or its cleared bits, disturb others for that time."""

_MEASURED = re.compile(rf"(?:({'|'.join(get_args(Source))}):)?([0-9]+(?:\.[0-9]+)?[a-z]+)")


@dataclass(frozen=True, slots=True)
class HeatRequest:
    """The source of heat that the user wants.

    Attributes:
        source: the source of a measurement.
        seconds: its duration; 0.0 for a file.
        path: the file to read; ``""`` for a measurement.
    """

    source: Source = "auto"
    seconds: float = 0.0
    path: str = ""


def parse_heat(value: object) -> HeatRequest:
    """Return the request that ``5s``, ``damon:5s``, or the path of a file means.

    Raises:
        UsageError: `value` is none of these, or too long.
    """
    text = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(text, str) or not text or "\0" in text:
        raise UsageError(f"{value!r} is neither a time nor a file", help="write 5s, damon:5s, or the path of a file")
    match = _MEASURED.fullmatch(text)
    if match is None:
        return HeatRequest(path=text)
    nanoseconds = parse_duration(match[2])
    above_zero(text, nanoseconds)
    if nanoseconds > LONGEST * 1e9:
        raise UsageError(f"heat of {text} is too long", help=f"measure for {LONGEST:g}s at most")
    return HeatRequest(cast(Source, match[1] or "auto"), nanoseconds / 1e9)


def parse_measured(value: object) -> HeatRequest:
    """Return the request that ``5s`` or ``damon:5s`` means; a file is refused.

    Raises:
        UsageError: `value` is neither.
    """
    request = parse_heat(value)
    if request.path:
        raise UsageError(f"{value!r} is not a time in which to measure heat", help="write 5s or damon:5s")
    return request


@dataclass(frozen=True, eq=False)
class Heat:
    """Accesses seen in spans of addresses. :meth:`of_spans` accepts any spans.

    Attributes:
        start, end: uint64, shape (spans,): disjoint, by ascending address.
        accesses: float64, the same shape: accesses seen in each span, above 0.
        source: name of the source, such as ``"damon (fvaddr)"``.
        seconds: duration of the measurement; 0.0 if unknown.
        cpu_seconds: processor time of the measurement, the kernel's included.
        remark: a remark on the measurement, as a sentence; ``""`` for none.
    """

    JSON: ClassVar = "source seconds cpu_seconds cpu_share spans accesses=total remark:null"

    start: NDArray[np.uint64]
    end: NDArray[np.uint64]
    accesses: NDArray[np.float64]
    source: str = ""
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    remark: str = ""

    @classmethod
    def of_spans(
        cls,
        start: NDArray[np.uint64],
        end: NDArray[np.uint64],
        accesses: NDArray[np.float64],
        *,
        source: str = "",
        seconds: float = 0.0,
        cpu_seconds: float = 0.0,
        remark: str = "",
    ) -> Heat:
        """Return the heat of spans in any order, which may overlap: accesses to the same bytes add up.

        Args:
            start, end: uint64, shape (spans,); the end lies behind the start.
            accesses: float64, the same shape; not below 0.
            source, seconds, cpu_seconds, remark: the other attributes.
        """
        bounds = np.unique(np.concatenate([start, end]))
        first, last = np.searchsorted(bounds, start), np.searchsorted(bounds, end)
        density = accesses / (end - start).astype(np.float64)
        steps, cover = np.zeros(len(bounds)), np.zeros(len(bounds), np.int64)
        for at, sign in ((first, 1), (last, -1)):
            np.add.at(steps, at, sign * density)
            np.add.at(cover, at, sign * (accesses > 0))
        # Where no span lies, sums of densities leave a rounding error instead of 0.
        dense = np.where(np.cumsum(cover) > 0, np.maximum(np.cumsum(steps), 0.0), 0.0)[:-1]
        hot = dense > 0
        low, high = bounds[:-1][hot], bounds[1:][hot]
        return cls(low, high, dense[hot] * (high - low).astype(np.float64), source, seconds, cpu_seconds, remark)

    @property
    def spans(self) -> int:
        """Number of spans."""
        return len(self.start)

    @property
    def total(self) -> float:
        """All accesses."""
        return float(self.accesses.sum())

    @property
    def cpu_share(self) -> float:
        """`cpu_seconds` as a part of one processor; 0.0 if the duration is unknown."""
        return self.cpu_seconds / self.seconds if self.seconds else 0.0

    def within(self, start: NDArray[np.uint64], end: NDArray[np.uint64]) -> NDArray[np.float64]:
        """Return the accesses in some ranges, if each span is used evenly: float64, shape (ranges,).

        Args:
            start, end: uint64, shape (ranges,).
        """
        return self._below(end) - self._below(start)

    def share(self, start: NDArray[np.uint64], end: NDArray[np.uint64]) -> float:
        """Return the share of all accesses that lie in disjoint ranges; 0.0 without accesses."""
        total = self.total
        return float(self.within(start, end).sum()) / total if total else 0.0

    def _below(self, address: NDArray[np.uint64]) -> NDArray[np.float64]:
        """Return the accesses below each address."""
        if not self.spans:
            return np.zeros(len(address))
        at = np.maximum(np.searchsorted(self.start, address, side="right") - 1, 0)
        # An address between two spans has all of the span below it behind it.
        inside = np.clip(address, self.start[at], self.end[at]) - self.start[at]
        before = np.concatenate([[0.0], np.cumsum(self.accesses)])[at]
        part = inside.astype(np.float64) / (self.end[at] - self.start[at]).astype(np.float64)
        return np.asarray(before + self.accesses[at] * part)

    def coarser(self, most: int) -> Heat:
        """Return the heat in about `most` spans: neighbours are joined, together with the gap between them."""
        if self.spans <= most:
            return self
        firsts = np.arange(0, self.spans, -(-self.spans // most))
        lasts = np.append(firsts[1:], self.spans) - 1
        accesses = np.add.reduceat(self.accesses, firsts)
        return replace(self, start=self.start[firsts], end=self.end[lasts], accesses=accesses)


def worth(heat: NDArray[np.float64], copied: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the worth of blocks: accesses, times the saved TLB entries, for each page that is copied.

    Args:
        heat: float64, shape (blocks,): accesses to each.
        copied: int64, the same shape: pages with contents, each of which takes one entry until one maps them all.
    """
    return heat * np.maximum(copied - 1, 0) / np.maximum(copied, 1)
