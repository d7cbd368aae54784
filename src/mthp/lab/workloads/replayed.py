"""A recording, replayed on the simulated machine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np

from mthp.addrspace import AddressSpace
from mthp.bounded import Bound
from mthp.lab.workloads.parameters import FilePath, Speed
from mthp.lab.workloads.program import Life, Program
from mthp.ptes import Pte, Segment, bytes_in, union
from mthp.vma import VmaKind

HELD = Bound(1 << 30, "pages of all steps of a recording together")
"""One byte of memory each: the pages mapped by any step, times the steps."""


@dataclass(frozen=True)
class Replay:
    """A recording of `mthp record`: new pages are written, and missing pages given back, at the time of their step.

    Only anonymous memory is replayed. What happened between two steps is unknown, and not invented.

    Attributes:
        file: a recording, or a snapshot, which counts as one step.
        speed: speed as a factor of the recorded one; 200% is twice as fast.
    """

    SOURCE: ClassVar[str] = "mthp record"

    file: FilePath
    speed: Speed = 1.0

    @property
    def most(self) -> int:
        """The resident bytes of the fullest step."""
        return max((int(held.sum()) * self._page for _, held in self._steps), default=0)

    @cached_property
    def _segments(self) -> tuple[Segment, ...]:
        """The ranges of anonymous memory of all steps together, in whole pages, merged."""
        spaces = (space for _, space in self._walk())
        merged = union((vma.start, vma.end) for space in spaces for vma in space.vmas() if vma.kind is VmaKind.ANON)
        from mthp.snapshot.bounds import PAGES

        PAGES.check(bytes_in(merged) // self._page)
        return merged

    @cached_property
    def _page(self) -> int:
        return next(space for _, space in self._walk()).geometry.page_size

    @cached_property
    def _steps(self) -> list[tuple[float, np.ndarray[tuple[int], np.dtype[np.bool_]]]]:
        """For each step its time, and which pages of the segments had contents."""
        segments, page = self._segments, self._page
        pages = bytes_in(segments) // page
        steps: list[tuple[float, np.ndarray[tuple[int], np.dtype[np.bool_]]]] = []
        for seconds, space in self._walk():
            # Before the step is read.
            HELD.check(pages * (len(steps) + 1))
            steps.append((seconds, _held(space, segments)))
        return steps

    def _walk(self) -> Iterator[tuple[float, AddressSpace]]:
        # Imported here, because recordings are a backend that only this model of the lab reads.
        from mthp.snapshot import load
        from mthp.snapshot.recording import Recording
        from mthp.snapshot.stream import is_recording

        if is_recording(self.file):
            for space in Recording(self.file).walk():
                yield space.step.seconds, space
            return
        with load(self.file) as snapshot:
            yield 0.0, snapshot

    def live(self, program: Program) -> Life:
        """Replay step after step."""
        starts = [program.map(end - start, at=start) for start, end in self._segments]
        before = np.zeros(bytes_in(self._segments) // self._page, np.bool_)
        ends = np.cumsum([(end - start) // self._page for start, end in self._segments])
        for seconds, held in self._steps:
            while (yield) * self.speed < seconds:
                pass
            for start, first, last in zip(starts, [0, *ends[:-1]], ends, strict=True):
                was, now = before[first:last], held[first:last]
                program.give_back(start, np.flatnonzero(was & ~now))
                program.write(start, np.flatnonzero(now & ~was))
            before = held
        while True:
            yield


def _held(space: AddressSpace, segments: tuple[Segment, ...]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    columns = space.read(segments)
    # Swapped-out pages have contents: the program wrote them.
    return columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO) | columns.has(Pte.SWAP)
