"""A recorded address space, read from its file through the seam.

Neither loading nor reading needs more memory than a few row groups, whatever the size of the recorded process.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace
from mthp.errors import UsageError
from mthp.ptes import ORDER_UNKNOWN, PteColumns, Segment, page_numbers
from mthp.snapshot.bounds import PAGES
from mthp.snapshot.description import SnapshotInfo
from mthp.snapshot.formats import run_reader
from mthp.snapshot.recorded import RecordedSpace
from mthp.snapshot.recording import Recording
from mthp.snapshot.runs import RunTable, decode, granules, join_granules
from mthp.snapshot.stream import is_recording
from mthp.snapshot.table import RunReader

_ROW_GROUPS_KEPT = 4


def load(path: str | os.PathLike[str]) -> SnapshotSpace:
    """Open the snapshot at `path` as an address space.

    Raises:
        UsageError: missing, unreadable, not a snapshot, cut short, damaged, inconsistent, or made by a newer mthp.
    """
    reader = run_reader(path)
    try:
        return SnapshotSpace(reader)
    except BaseException:
        reader.close()
        raise


def info(path: str | os.PathLike[str]) -> SnapshotInfo:
    """Return the summary of the snapshot at `path`, from its description only.

    Damage elsewhere is not noticed.

    Raises:
        UsageError: see :func:`load`, as far as the description shows.
    """
    reader = run_reader(path)
    try:
        return reader.info
    finally:
        reader.close()


class SnapshotSpace(RecordedSpace):
    """The address space in a file.

    It can be read and planned on, not collapsed; page frames are not recorded.

    Args:
        reader: an open file, closed with this.

    Raises:
        UsageError: the runs contradict the description or each other.
    """

    def __init__(self, reader: RunReader) -> None:
        super().__init__(reader.description, reader.path, "snapshot")
        self._reader = reader
        # Plans read ascending addresses, so the same row group is needed several times in a row.
        self._runs = functools.lru_cache(_ROW_GROUPS_KEPT)(reader.runs)
        # The whole file once, so that damage is found now, and not in the middle of a plan.
        covered = _checked_cover(reader)
        self._first, self._end = covered[:, 0], covered[:, 1]

    @property
    def info(self) -> SnapshotInfo:
        """The summary of the file."""
        return self._reader.info

    def read(self, segments: Sequence[Segment]) -> PteColumns:
        """Return the entries of `segments` as recorded.

        Addresses that were not mapped or not read then are none.

        Raises:
            UsageError: the file was damaged since it was loaded.
        """
        spans = page_numbers(segments, self.geometry.page_size)
        # Cut to what the spans need: a row group may have 65 536 runs, and a request one page.
        needed = [self._overlapping(self._runs(index), spans) for index in self._row_groups(spans)]
        state, folio_order = decode(RunTable.joined(needed), spans)
        return PteColumns(tuple(segments), state, folio_order)

    def populated(self, segments: Sequence[Segment], granule: int) -> list[Segment]:
        """Return the parts of `segments` that hold runs, in aligned granules, clipped to their segment.

        Raises:
            UsageError: the file was damaged since it was loaded.
        """
        page_size = self.geometry.page_size
        spans = page_numbers(segments, page_size)
        size = max(1, granule // page_size)
        parts = [granules(self._runs(index), spans, size) for index in self._row_groups(spans)]
        if not parts:
            return []
        found = np.concatenate(parts)
        # A span may touch several row groups, and its parts are still apart.
        found = join_granules(found[np.argsort(found[:, 0], kind="stable")])
        return [(first * page_size, end * page_size) for _, first, end in found.tolist()]

    def close(self) -> None:
        """Close the file."""
        self._runs.cache_clear()
        self._reader.close()

    def _row_groups(self, spans: NDArray[np.int64]) -> Iterable[int]:
        """Return the row groups that any of `spans` may touch, ascending."""
        low = np.searchsorted(self._end, spans[:, 0], "right")
        high = np.searchsorted(self._first, spans[:, 1], "left")
        # +1 where a span's row groups begin, -1 behind them: the running sum is positive on the needed ones.
        touched = low < high
        steps = np.zeros(len(self._first) + 1, np.int64)
        np.add.at(steps, low[touched], 1)
        np.add.at(steps, high[touched], -1)
        needed: list[int] = np.flatnonzero(np.cumsum(steps[:-1])).tolist()
        return needed

    @staticmethod
    def _overlapping(runs: RunTable, spans: NDArray[np.int64]) -> RunTable:
        """Return the slice of `runs` from the first to the last that any of `spans` touches."""
        low = int(np.searchsorted(runs.end, spans[:, 0].min(), "right"))
        return runs[low : int(np.searchsorted(runs.first, spans[:, 1].max(), "left"))]


def _checked_cover(reader: RunReader) -> NDArray[np.int64]:
    """Check all runs of the file against its mappings and each other.

    Returns:
        int64, shape (row groups, 2): number of the first page of each row group, and of the page behind it.

    Raises:
        UsageError: they contradict each other.
    """
    description = reader.description
    mappings = page_numbers([(vma.start, vma.end) for vma in description.vmas], description.geometry.page_size)
    covered, total = [], 0
    end = 0
    for index in range(reader.row_groups):
        runs = reader.runs(index)
        if not len(runs):
            continue
        if problem := _contradiction(runs, mappings, end):
            raise UsageError(f"{reader.path}: damaged: {problem}")
        # Row groups follow one another, so each must begin behind the one before.
        end = int(runs.end[-1])
        covered.append((int(runs.first[0]), end))
        total += int(runs.pages.sum())
        PAGES.check(total)
    if total != description.pages:
        raise UsageError(
            f"{reader.path}: damaged: it holds {total} pages, not the {description.pages} of its description"
        )
    return np.array(covered, np.int64).reshape(-1, 2)


def _contradiction(runs: RunTable, mappings: NDArray[np.int64], end: int) -> str:
    """Return the error in `runs`, which must lie behind page number `end` and in their mappings; ``""`` if none."""
    if (runs.vma < 0).any() or (runs.vma >= len(mappings)).any():
        return "a run of a mapping that is not listed"
    if (runs.first < mappings[runs.vma, 0]).any() or (runs.end > mappings[runs.vma, 1]).any():
        return "a run that leaves its mapping"
    # decode() and the binary searches rely on this order.
    if runs.first[0] < end or (runs.first[1:] < runs.end[:-1]).any():
        return "runs that overlap or do not ascend"
    if (runs.folio_order < ORDER_UNKNOWN).any():
        return "a folio order below 0"
    return ""


def open_file(path: str | os.PathLike[str], *, at: str | None = None) -> AddressSpace:
    """Open a snapshot, or one step of a recording.

    Args:
        at: step of a recording, in the form of :meth:`~mthp.snapshot.recording.Recording.step_at`; by default the last.

    Raises:
        UsageError: the file is neither of them or is damaged, or the step does not exist.
    """
    if is_recording(path):
        recording = Recording(path)
        return recording.space(recording.step_at(at))
    if at is not None:
        raise UsageError(f"{os.fspath(path)} is a snapshot, which has no step {at!r}", help="leave --at out")
    return load(path)
