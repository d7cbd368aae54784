"""mTHPs beside huge pages: their cost in memory and time, the delay of the program, and its speed afterwards.

The demo compares two processes with the same data that it starts itself (:mod:`mthp.demo.workload`). One is collapsed
to folios of 64 KiB and more, the other to huge pages alone, as khugepaged does by default; then the memory that the
huge pages waste is given back.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from mthp.abilities import move_refusals
from mthp.demo.client import DataCheck, Measurement, Workload, fit_size
from mthp.engine.collapse import collapse_space
from mthp.engine.report import CollapseReport
from mthp.engine.select import PlanOptions
from mthp.engine.trim import TrimOptions, trim_space
from mthp.errors import MthpError, NotPermittedError, UnsupportedError
from mthp.geometry import MIN_ANON_ORDER, Geometry
from mthp.linux.live import LiveAddressSpace, open_live
from mthp.linux.memorylimits import memory_bounds
from mthp.linux.split.file import split_ability
from mthp.means import Means, Mechanism
from mthp.measuring import measure
from mthp.metrics import Durations
from mthp.progress import StepProgress
from mthp.trimming import SMALLEST_LARGE

DEFAULT_SIZE = 256 << 20
"""Bytes of memory that each of two workloads grows to, where there is room: forty times what a TLB of 1 536 entries
maps with 4 KiB pages, and grown within seconds.
"""

MEASUREMENTS = 5
"""Measurements of each speed."""

QUIET_SECONDS = 1.0
"""Seconds for which the first workload is watched while it is left alone."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Random lookups a second, over several measurements.

    Attributes:
        median: median of the measurements' medians.
        low, high: the lowest lower and the highest upper quartile of any measurement.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, measurements: list[Measurement]) -> Speed:
        """Summarise `measurements`."""
        return cls(
            statistics.median(one.lookups_per_s for one in measurements),
            min(one.low for one in measurements),
            max(one.high for one in measurements),
        )


@dataclass
class Chapter:
    """A workload after one operation.

    Attributes:
        name: name of the operation.
        coverage: the share of the anonymous memory in folios of 64 KiB and more.
        resident_bytes: anonymous memory.
        added_bytes: increase of `resident_bytes` by the operation.
        elapsed: duration in seconds; 0.0 if nothing was done.
        waits: durations of single lookups during the operation; None if there were no lookups.
        speed: the workload's speed afterwards.
        speedup: that over its speed before.
    """

    JSON: ClassVar = "name coverage resident_bytes added_bytes elapsed_seconds=elapsed waits speed speedup"

    name: str
    coverage: float
    resident_bytes: int
    added_bytes: int = 0
    elapsed: float = 0.0
    waits: Durations | None = None
    speed: Speed | None = None
    speedup: float | None = None


@dataclass
class Story:
    """Result of the demo.

    Attributes:
        target: names of the two processes.
        kernel: kernel release.
        geometry: geometry of the machine.
        order: order of the smallest folio that counts.
        mechanisms: mechanisms that made the mTHPs of each order.
        why: the reason for which a better mechanism was not used; ``""`` if the best was.
        chapters: before, by mTHPs, by huge pages, and these trimmed.
        intact: whether every byte of the data reads as before.
        undone: operations that failed, and why.
        notes: further remarks.
    """

    JSON: ClassVar = (
        "target kernel geometry coverage_order=order mechanism_by_order=mechanisms reason=why chapters intact undone"
        " notes"
    )

    target: str
    kernel: str
    geometry: Geometry
    order: int
    mechanisms: dict[int, Mechanism | None] = field(default_factory=dict)
    why: str = ""
    chapters: list[Chapter] = field(default_factory=list)
    intact: bool = True
    undone: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every operation was done, and the data reads as before."""
        return self.intact and not self.undone


def tell(size: int, seconds: float, progress: StepProgress) -> Story:
    """Run the whole story.

    Args:
        size: bytes of memory for each workload, or less where memory is scarce.
        seconds: duration of each measurement.
        progress: called from time to time.

    Raises:
        UnsupportedError: this kernel has no transparent huge pages, or there is too little memory.
        MthpError: a workload ended.
    """
    fitting = fit_size(size, memory_bounds(Path("/proc/self/cgroup").read_text()), workloads=2)
    with Workload() as first, Workload() as second:
        # Both are started before either is awaited, so that they grow at the same time.
        for workload in (first, second):
            workload.begin(fitting)
        for number, workload in enumerate((first, second), 1):
            workload.await_ready(_named(progress, f"workload {number}"))
        with open_live(first.pid) as small, open_live(second.pid) as huge:
            story = _Telling(_Side(first, small), _Side(second, huge), seconds, progress).tell()
    if fitting < size:
        story.notes.append(f"memory is scarce: a workload has {fitting >> 20}M instead of {size >> 20}M")
    return story


def _named(progress: StepProgress, name: str) -> StepProgress:
    return lambda done, total, what: progress(done, total, f"{name}: {what}")


@dataclass
class _Side:
    """A workload, its address space, and its state before."""

    workload: Workload
    space: LiveAddressSpace
    speed: float = 0.0
    resident: int = 0


class _Telling:
    """One run of the story, while its workloads live."""

    def __init__(self, small: _Side, huge: _Side, seconds: float, progress: StepProgress) -> None:
        self._small, self._huge, self._seconds, self._progress = small, huge, seconds, progress
        space, geometry = small.space, small.space.geometry
        order = max(MIN_ANON_ORDER, (SMALLEST_LARGE // geometry.page_size).bit_length() - 1)
        self._pmd = geometry.label(geometry.pmd_order)
        self._story = Story(f"{space.label} and {huge.space.label}", space.kernel, geometry, order)

    def tell(self) -> Story:
        """Do all chapters, and return the result.

        Raises:
            MthpError: a workload ended.
        """
        story, small, huge = self._story, self._small, self._huge
        contents = self._contents("before")
        speeds = self._speeds("before", [small, huge])
        # To compare the delays of lookups with, which a busy machine has, too.
        story.chapters.append(self._quiet(speeds[0]))
        for side, speed in zip((small, huge), speeds, strict=True):
            side.speed, side.resident = speed.median, self._chapter("", side).resident_bytes
        made = [
            (side, chapter)
            for side, act in ((small, self._by_mthps), (huge, self._by_huge_pages))
            if (chapter := self._try(act))
        ]
        for (side, chapter), speed in zip(made, self._speeds("after", [side for side, _ in made]), strict=True):
            chapter.speed, chapter.speedup = speed, speed.median / side.speed
        if trimmed := self._try(self._by_trim):
            [trimmed.speed] = self._speeds("after the trim", [huge])
            trimmed.speedup = trimmed.speed.median / huge.speed
        story.intact = self._contents("after") == contents and all(one.intact for one in contents)
        return story

    def _contents(self, when: str) -> list[DataCheck]:
        found = []
        for number, side in enumerate((self._small, self._huge)):
            self._progress(number, 2, f"reading all data {when}")
            found.append(side.workload.verify())
        self._progress(2, 2, f"reading all data {when}")
        return found

    def _speeds(self, when: str, sides: list[_Side]) -> list[Speed]:
        """Measure workloads in turn, and return the speed of each."""
        measured: list[list[Measurement]] = [[] for _ in sides]
        for number in range(MEASUREMENTS):
            self._progress(number, MEASUREMENTS, f"measuring {when}")
            # In turn, so that other programs on the machine disturb both alike.
            for side, measurements in zip(sides, measured, strict=True):
                measurements.append(side.workload.measure(self._seconds))
        self._progress(MEASUREMENTS, MEASUREMENTS, f"measuring {when}")
        return [Speed.of(measurements) for measurements in measured]

    def _quiet(self, speed: Speed) -> Chapter:
        """Watch the first workload while nothing is done to it."""
        self._progress(0, 1, "watching undisturbed")
        with self._small.workload.serving() as waits:
            time.sleep(QUIET_SECONDS)
        self._progress(1, 1, "watching undisturbed")
        chapter = self._chapter("before", self._small, waits=waits[0])
        chapter.speed = speed
        return chapter

    def _chapter(self, name: str, side: _Side, elapsed: float = 0.0, waits: Durations | None = None) -> Chapter:
        seen = measure(side.space, side.space.vmas()).now
        geometry = self._story.geometry
        # Without frame numbers, only memory that a PMD entry maps is known to be large.
        share = seen.share(geometry.pmd_order if seen.unknown else self._story.order)
        resident = seen.resident_bytes(geometry)
        # Before the first operation there is nothing to compare with, and the difference is 0.
        return Chapter(name, share, resident, resident - (side.resident or resident), elapsed, waits)

    def _try(self, act: Callable[[], Chapter]) -> Chapter | None:
        """Return the chapter that `act` makes; None, with a note, if it is impossible here."""
        try:
            chapter = act()
        except (NotPermittedError, UnsupportedError) as error:
            self._story.undone.append(error.message + (f" ({error.help})" if error.help else ""))
            return None
        self._story.chapters.append(chapter)
        return chapter

    def _by_mthps(self) -> Chapter:
        story, space = self._story, self._small.space
        means, story.why = _best_means(space)
        geometry = story.geometry
        # Holes are filled up to an eighth of a folio.
        limit = geometry.ptes_per_pmd // 8
        choice = PlanOptions("no-creep", orders=range(story.order, geometry.pmd_order + 1), max_ptes_none=limit)
        report, waits = self._collapse(self._small, choice, means, "making mTHPs")
        story.mechanisms = report.mechanisms
        return self._chapter("mTHPs", self._small, report.elapsed, waits)

    def _by_huge_pages(self) -> Chapter:
        geometry = self._story.geometry
        # As khugepaged's default (khugepaged_init(), mm/khugepaged.c).
        choice = PlanOptions(orders=(geometry.pmd_order,), max_ptes_none=geometry.ptes_per_pmd - 1)
        means = Means(mechanism="madvise", max_bloat=None)
        try:
            report, waits = self._collapse(self._huge, choice, means, f"making folios of {self._pmd}")
        except NotPermittedError as error:
            # process_madvise(2) on another process takes CAP_SYS_NICE; on itself a process needs no privilege.
            self._story.undone.append(f"{error.message}: the workload collapsed itself to {self._pmd}")
            return self._chapter("huge pages", self._huge, self._huge.workload.collapse_itself())
        return self._chapter("huge pages", self._huge, report.elapsed, waits)

    def _collapse(self, side: _Side, choice: PlanOptions, means: Means, what: str) -> tuple[CollapseReport, Durations]:
        """Collapse while the workload looks documents up, and note the blocks that were left."""
        with side.workload.serving() as waits:
            report = collapse_space(
                side.space, choice, means, progress=lambda done, total, _: self._progress(done, total, what)
            )
        for tally in (report.ranges, *report.folios.values()):
            self._story.undone += [f"{what}: {one.folios} left: {one.reason}" for one in tally.reasons]
        if report.error is not None:
            self._story.undone.append(f"{what}: {report.error.message}")
        return report, waits[0]

    def _by_trim(self) -> Chapter:
        with self._huge.workload.serving() as waits:
            report = trim_space(self._huge.space, TrimOptions(), progress=_named(self._progress, "trimming"))
        self._story.undone += [f"trimming: {count} left: {reason}" for reason, count in report.reasons.items()]
        return self._chapter("trimmed", self._huge, report.elapsed, waits[0])


def _best_means(space: LiveAddressSpace) -> tuple[Means, str]:
    """Return the best means of making mTHPs here, and why better ones are missing; ``""`` for the best."""
    if space.splits():
        return Means(max_bloat=None), ""
    try:
        split_ability(space.geometry).require_split()
        why = "page frames cannot be seen"
    except MthpError as error:
        why = error.message
    if space.drives_khugepaged(space.geometry.pmd_order - 1):
        return Means(max_bloat=None), why
    moving = Means(mechanism="madvise,move", fill=True, max_bloat=None)
    if refusals := move_refusals(space, moving):
        raise UnsupportedError(f"no mTHPs can be made: {why}, and moving is refused: {'; '.join(refusals)}")
    return moving, why
