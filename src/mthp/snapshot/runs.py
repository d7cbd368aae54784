"""Runs of pages with equal state: from columns to runs, and back.

A process of 64 GiB has 16 million page table entries, but its memory was mostly faulted in and freed in stretches. A
few hundred thousand runs describe it, and none pages need no runs. This module turns blocks of
:class:`~mthp.ptes.PteColumns` into :class:`RunTable`, and cuts segments out of runs again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mthp.errors import UsageError
from mthp.ptes import ORDER_NONE, ColumnTable, PteColumns, page_numbers


@dataclass(frozen=True)
class RunTable(ColumnTable):
    """Runs by ascending address, disjoint.

    Attributes:
        vma: index of the mapping that the run lies in.
        first: number of the first page.
        pages: base pages in the run.
        state: bits of :class:`~mthp.ptes.Pte`.
        folio_order: as in :class:`~mthp.ptes.PteColumns`. A run may span many folios.
    """

    DTYPES = (np.int32, np.int64, np.int64, np.uint16, np.int8)

    vma: NDArray[np.int32]
    first: NDArray[np.int64]
    pages: NDArray[np.int64]
    state: NDArray[np.uint16]
    folio_order: NDArray[np.int8]

    @property
    def end(self) -> NDArray[np.int64]:
        """Number of the page behind each run: int64, shape (runs,)."""
        return self.first + self.pages


def checked_runs(
    columns: Sequence[NDArray[Any]], vma: NDArray[np.int32], page_size: int, address_limit: int
) -> RunTable:
    """Return the runs in the columns `start`, `pages`, `state` and `folio_order` of a file.

    Raises:
        UsageError: a run does not have whole pages, or does not lie below `address_limit`.
    """
    start, pages, state, folio_order = columns
    first, most = start // page_size, address_limit // page_size
    # `pages` is checked alone first: the sum of two 64-bit numbers may wrap.
    if (start % page_size).any() or not pages.all() or (pages > most).any() or (first + pages > most).any():
        raise UsageError("damaged: a run that has no whole pages")
    return RunTable(vma, first.astype(np.int64), pages.astype(np.int64), state, folio_order)


def encode(columns: PteColumns, vma_first: NDArray[np.int64], page_size: int) -> RunTable:
    """Return the runs of `columns`, without none pages.

    Args:
        columns: columns of segments that each lie in one mapping.
        vma_first: int64, shape (vmas,), ascending: number of the first page of each mapping.
    """
    if not len(columns.state):
        return RunTable.joined([])
    spans = page_numbers(columns.segments, page_size)
    lengths = spans[:, 1] - spans[:, 0]
    offsets = np.cumsum(lengths) - lengths
    # A run begins at the first page of each segment, and at each page that differs from the one before.
    heads = np.empty(len(columns.state), np.bool_)
    heads[1:] = columns.state[1:] != columns.state[:-1]
    heads[1:] |= columns.folio_order[1:] != columns.folio_order[:-1]
    # An empty segment would mark the first page of the next one, or lie behind the last.
    heads[offsets[lengths > 0]] = True
    at = np.flatnonzero(heads)
    pages = np.diff(at, append=len(heads))
    # none pages need no runs: they are the gaps.
    mapped = columns.state[at] != 0
    at, pages = at[mapped], pages[mapped]
    # Back from a place in the columns to the segment, and to the page number in it.
    segment = np.searchsorted(offsets, at, "right") - 1
    first = spans[segment, 0] + at - offsets[segment]
    vma = (np.searchsorted(vma_first, first, "right") - 1).astype(np.int32)
    return RunTable(vma, first, pages, columns.state[at], columns.folio_order[at])


def joined(runs: RunTable) -> RunTable:
    """Return `runs` with neighbours of the same mapping, state and order joined."""
    if not len(runs):
        return runs
    # Neighbours in different portions may continue each other, and must not depend on their size.
    heads = np.ones(len(runs), np.bool_)
    heads[1:] = runs.first[1:] != runs.end[:-1]
    for column in (runs.vma, runs.state, runs.folio_order):
        heads[1:] |= column[1:] != column[:-1]
    at = np.flatnonzero(heads)
    return RunTable(runs.vma[at], runs.first[at], np.add.reduceat(runs.pages, at), runs.state[at], runs.folio_order[at])


def decode(runs: RunTable, spans: NDArray[np.int64]) -> tuple[NDArray[np.uint16], NDArray[np.int8]]:
    """Return the state and folio order of every page of `spans`, one span after another.

    Args:
        runs: runs that overlap any of the spans; others are ignored.
        spans: int64, shape (spans, 2): page numbers, half-open, in any order.

    Returns:
        uint16 and int8, each of shape (pages,).
    """
    lengths = spans[:, 1] - spans[:, 0]
    offsets = np.cumsum(lengths) - lengths
    span, run, begin, end = _overlaps(runs, spans)
    at = offsets[span] + begin - spans[span, 0]
    # Laid out as gap, run, gap, run, ..., gap: one np.repeat() is then the column, whatever the number of spans.
    repeats = np.empty(2 * len(run) + 1, np.int64)
    repeats[1::2] = end - begin
    repeats[0::2] = np.append(at, lengths.sum())
    repeats[2::2] -= at + repeats[1::2]
    state = np.zeros(len(repeats), np.uint16)
    state[1::2] = runs.state[run]
    folio_order = np.full(len(repeats), ORDER_NONE, np.int8)
    folio_order[1::2] = runs.folio_order[run]
    return np.repeat(state, repeats), np.repeat(folio_order, repeats)


def granules(runs: RunTable, spans: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Return the aligned granules of `spans` that the runs touch, neighbours joined.

    Args:
        spans: int64, shape (spans, 2): page numbers, half-open.
        size: pages in a granule.

    Returns:
        int64, shape (parts, 3): the span's index, the first page, the page behind; clipped to the span.
    """
    span, _, begin, end = _overlaps(runs, spans)
    # Granules may reach beyond their span, whose neighbour may belong to another mapping.
    begin = np.maximum(begin // size * size, spans[span, 0])
    end = np.minimum(-(-end // size) * size, spans[span, 1])
    return join_granules(np.stack((span, begin, end), axis=1))


def join_granules(parts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Join those `parts` of :func:`granules` that touch; they must ascend within each span."""
    heads = np.ones(len(parts), np.bool_)
    heads[1:] = (parts[1:, 0] != parts[:-1, 0]) | (parts[1:, 1] > parts[:-1, 2])
    lasts = np.append(heads[1:], True)[: len(heads)]
    return np.column_stack((parts[heads, 0], parts[heads, 1], parts[lasts, 2]))


def _overlaps(
    runs: RunTable, spans: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return every pair of a span and a run that overlap: index of the span, of the run, first page, page behind."""
    # An empty span that lies inside a run overlaps nothing.
    spans = np.where(spans[:, :1] < spans[:, 1:], spans, 0)
    # Runs are sorted and disjoint, so those of a span are a slice.
    low = np.searchsorted(runs.end, spans[:, 0], "right")
    counts = np.maximum(np.searchsorted(runs.first, spans[:, 1], "left") - low, 0)
    span = np.repeat(np.arange(len(spans)), counts)
    run = np.arange(counts.sum()) + np.repeat(low - (np.cumsum(counts) - counts), counts)
    begin = np.maximum(runs.first[run], spans[span, 0])
    end = np.minimum(runs.end[run], spans[span, 1])
    return span, run, begin, end
