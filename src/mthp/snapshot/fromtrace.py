"""Recordings made from traces of memory accesses (:mod:`mthp.snapshot.traces`).

Mappings are guessed: pages in one PMD range or in neighbouring ones form one anonymous mapping of whole PMD ranges.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mthp.geometry import X86_64, Geometry
from mthp.progress import Progress
from mthp.ptes import ORDER_NONE, Pte, PteColumns
from mthp.snapshot.bounds import TRACED_PAGES
from mthp.snapshot.description import Description
from mthp.snapshot.formats import check_new, stream_writer
from mthp.snapshot.recorder import StepTaker
from mthp.snapshot.recording import RecordingSpace, RecordingStep, packed_pages
from mthp.snapshot.runs import RunTable, encode
from mthp.snapshot.traces import Trace
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma


@dataclass(frozen=True, slots=True)
class RecordedTrace:
    """Summary of a recording of a trace.

    Attributes:
        path: path of the file.
        label: name of the trace.
        kind: kind of the trace.
        steps: number of steps.
        accesses: number of accesses in the trace.
        pages: number of different pages used.
        skipped: number of lines skipped.
        bytes: size of the file.
    """

    JSON: ClassVar = "path target=label kind steps accesses pages skipped bytes"

    path: str
    label: str
    kind: str
    steps: int
    accesses: int
    pages: int
    skipped: int
    bytes: int


def record_trace(
    trace: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    kind: str | None = None,
    geometry: Geometry = X86_64,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> RecordedTrace:
    """Make a recording at `path` from the trace at `trace`.

    Args:
        kind: kind of the trace; detected if None.
        geometry: geometry of the machine that it was made on.
        overwrite: replace a regular file or a symbolic link of that name.

    Raises:
        UsageError: `trace` is not a trace, or not of that kind; or `path` exists.
        MthpError: the recording cannot be written.
    """
    check_new(path, overwrite=overwrite)
    opened = Trace(trace, kind, geometry.page_size)
    steps = opened.steps(progress)
    # The first step shows that the trace is not empty, before a file is created.
    step = next(steps, None)
    space = _TraceSpace(f"{opened.kind} trace {Path(trace).name}", geometry)
    taker = StepTaker(space)
    count = accesses = 0
    with stream_writer(path, taker.description, overwrite=overwrite) as writer:
        while step is not None:
            space.use(step.pages)
            meta, runs = taker.take()
            # The accesses themselves, too, in their order: the model of the TLB needs it.
            writer.add(runs, meta | {"seconds": step.seconds, "accesses": packed_pages(step.pages)})
            count, accesses = count + 1, accesses + step.accesses
            step = next(steps, None)
        writer.add(RunTable.joined([]), {"end": "the trace was over"})
        size = writer.bytes
    return RecordedTrace(os.fspath(path), space.label, opened.kind, count, accesses, space.pages, opened.skipped, size)


class _TraceSpace(RecordingSpace):
    """The address space of a trace, as it grows."""

    def __init__(self, label: str, geometry: Geometry) -> None:
        description = Description(
            label=label,
            kernel="unknown",
            recorded_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            geometry=geometry,
            switches=Switches.defaults(geometry),
            tunables=Tunables.defaults(geometry),
            thp_disabled=False,
            missing=("mappings, and memory that was not used while the trace was made: a trace does not show them",),
            vmas=(),
            pages=0,
        )
        super().__init__(description, RunTable.joined([]), RecordingStep(0, 0.0, 0.0, {}, 0), label)
        self._seen: NDArray[np.int64] = np.empty(0, np.int64)

    @property
    def pages(self) -> int:
        """Number of different pages used so far."""
        return len(self._seen)

    def use(self, pages: NDArray[np.int64]) -> None:
        """Use some pages, by number."""
        used = np.unique(pages)
        self._seen = np.union1d(self._seen, used)
        # Every step processes all pages seen so far, so their number is what costs time.
        TRACED_PAGES.check(len(self._seen))
        recently = np.isin(self._seen, used, assume_unique=True)
        # A trace shows use, not mapping: a page counts as mapped, by a base page, from its first use on.
        state = np.where(recently, np.uint16(Pte.PRESENT), np.uint16(Pte.PRESENT | Pte.UNREFERENCED))
        self._description = replace(self._description, vmas=self._mappings())
        self._runs = self._encoded(state)

    def _mappings(self) -> tuple[Vma, ...]:
        size = self.geometry.pmd_size
        ranges = np.unique(self._seen // self.geometry.ptes_per_pmd)
        # Neighbours, or with one unused range between them.
        breaks = np.flatnonzero(np.diff(ranges) > 2) + 1
        firsts, lasts = ranges[np.r_[0, breaks]], ranges[np.r_[breaks - 1, len(ranges) - 1]] + 1
        return tuple(
            Vma(first * size, last * size, "rw-p", has_anon_vma=True)
            for first, last in zip(firsts.tolist(), lasts.tolist(), strict=True)
        )

    def _encoded(self, state: NDArray[np.uint16]) -> RunTable:
        """Return the seen pages as runs; only adjoining pages share a segment."""
        breaks = np.flatnonzero(np.diff(self._seen) != 1) + 1
        page = self.geometry.page_size
        firsts, lasts = self._seen[np.r_[0, breaks]], self._seen[np.r_[breaks - 1, len(self._seen) - 1]] + 1
        segments = tuple(zip((firsts * page).tolist(), (lasts * page).tolist(), strict=True))
        vma_first = np.array([vma.start // page for vma in self._description.vmas], np.int64)
        columns = PteColumns(segments, state, np.where(state == 0, np.int8(ORDER_NONE), np.int8(0)))
        return encode(columns, vma_first, page)
