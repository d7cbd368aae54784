"""Recording an address space over time: the changes of each step, at a bounded cost.

:func:`mthp.abilities.watch` of the seam reads the target, and leaves out memory known to be unchanged. Memory use is a
few bytes for each PMD range.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from mthp import abilities
from mthp.addrspace import AddressSpace
from mthp.errors import TargetVanishedError, UsageError
from mthp.geometry import Geometry
from mthp.heat import Heat
from mthp.ptes import ORDER_NONE, PteColumns, Segment, page_numbers
from mthp.snapshot.description import Description, vma_to_json
from mthp.snapshot.formats import check_new, stream_writer
from mthp.snapshot.record import describe
from mthp.snapshot.recording import CHANGING
from mthp.snapshot.runs import RunTable, encode
from mthp.snapshot.stream import Meta
from mthp.vma import Vma, VmaKind

MAPPINGS_EVERY = 16
"""Steps after which the properties of all mappings are read again even if their addresses did not change."""

PATIENCE = 0.05
"""Seconds between two checks whether to stop."""

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Pace:
    """Times at which steps are taken.

    Attributes:
        every: seconds from one step to the next.
        duration: seconds after which the recording ends; None to end when it is stopped.
        cpu: share of one processor that recording may use, above 0; None for no bound. If a step uses more, the next is
            delayed.

    Raises:
        UsageError: one of them is not above 0.
    """

    every: float = 1.0
    duration: float | None = None
    cpu: float | None = None

    def __post_init__(self) -> None:
        for name in ("every", "duration", "cpu"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} is not above 0: {value:g}", help="use a larger value")


OVER = "the duration was over"
"""Why a recording ended whose next step was due after its duration."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """Summary of a recording.

    Attributes:
        path: path of the file.
        label: the target's name.
        steps: number of steps.
        seconds: seconds from the first step to the last.
        bytes: size of the file.
        cpu_seconds: processor time of this process.
        end: why it ended.
        every: requested seconds from one step to the next.
        missing: data that could not be read, and how to make it readable.
    """

    JSON: ClassVar = "path target=label steps seconds bytes cpu_seconds end interval every missing"

    path: str
    label: str
    steps: int
    seconds: float
    bytes: int
    cpu_seconds: float
    end: str
    every: float
    missing: tuple[str, ...]

    @property
    def interval(self) -> float:
        """Mean seconds from one step to the next; 0.0 for a single step."""
        return self.seconds / max(1, self.steps - 1)


def record_series(
    space: AddressSpace,
    path: str | os.PathLike[str],
    pace: Pace | None = None,
    *,
    stop: Callable[[], bool] = lambda: False,
    overwrite: bool = False,
    heat: Heat | None = None,
    progress: Callable[[int, float, int], None] = lambda steps, seconds, size: None,
    clock: Clock = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
    cpu_clock: Clock = time.process_time,
) -> Recorded:
    """Record `space` into a new file at `path`, until `stop` returns True, the duration is over, or the target exits.

    Args:
        overwrite: replace a regular file or a symbolic link of that name.
        heat: memory that `space` uses, stored with it.
        progress: called after every step with (steps, seconds, bytes).

    Raises:
        UsageError: the file exists or cannot be created.
        MthpError: it cannot be written any more. The steps written before are kept; without any, no file is left.
        TargetVanishedError: the target exited before the first step. No file is left.
    """
    timer = _Timer(pace or Pace(), stop, clock, sleep)
    check_new(path, overwrite=overwrite)
    cpu_begin = cpu_clock()
    taker = StepTaker(space, heat)
    meta, runs = taker.take()
    last, steps, spent = 0.0, 0, cpu_clock() - cpu_begin
    with stream_writer(path, taker.description, overwrite=overwrite) as writer:
        while True:
            writer.add(runs, meta | {"seconds": round(last, 6), "cpu_seconds": round(spent, 6)})
            steps += 1
            progress(steps, last, writer.bytes)
            if end := timer.wait(last, spent):
                break
            before, last = cpu_clock(), timer.now()
            try:
                meta, runs = taker.take()
            except TargetVanishedError:
                end = "the target exited"
                break
            spent = cpu_clock() - before
        # Without this a reader takes the file for one that was cut off.
        writer.add(RunTable.joined([]), {"end": end, "seconds": round(timer.now(), 6)})
        size = writer.bytes
    label, spent, every = taker.description.label, cpu_clock() - cpu_begin, timer.pace.every
    return Recorded(os.fspath(path), label, steps, last, size, spent, end, every, space.missing)


class _Timer:
    """The times of a recording, in seconds since it began."""

    def __init__(self, pace: Pace, stop: Callable[[], bool], clock: Clock, sleep: Callable[[float], None]) -> None:
        self.pace = pace
        self._stop, self._clock, self._sleep = stop, clock, sleep
        self._begin = clock()

    def now(self) -> float:
        return self._clock() - self._begin

    def wait(self, last: float, spent: float) -> str:
        """Wait until the step after that at `last` is due; return why there is none, or ``""``.

        Args:
            spent: processor seconds of the last step.
        """
        pace = self.pace
        # From the beginning of the last step, so that its own time is a part of the interval.
        due = last + max(pace.every, spent / pace.cpu if pace.cpu else 0.0)
        over = due if pace.duration is None else pace.duration
        until = self._begin + min(due, over)
        # By the clock itself: a rest that is only an error of rounding would not move the clock of a simulation.
        while (rest := until - self._clock()) > 0 and not self._stop():
            self._sleep(min(rest, PATIENCE))
        if self._stop():
            return "stopped"
        # No step would be due before the end.
        return OVER if due > over else ""


class StepTaker:
    """Takes the steps of an address space, one after another.

    Attributes:
        description: description of the target at the first step; its mappings are in the steps.
    """

    def __init__(self, space: AddressSpace, heat: Heat | None = None) -> None:
        self._space = space
        self._watch = abilities.watch(space)
        self.description: Description = describe(space, (), heat)
        self._values: dict[str, Any] = _changing(self.description)
        self._mapped: list[Segment] = []
        self._vmas: dict[int, Vma] = {}
        self._counters: dict[str, int] = {}
        self._sums: dict[int, int] = {}
        self._looked: list[Segment] = []
        self._number = 0

    def take(self) -> tuple[Meta, RunTable]:
        """Return the changes since the step before."""
        meta: Meta = self._mappings()
        vmas = list(self._vmas.values())
        geometry = self._space.geometry
        segments = [
            segment
            for vma in vmas
            if vma.kind is not VmaKind.SPECIAL
            for segment in self._space.populated([(vma.start, vma.end)], geometry.pmd_size)
        ]
        first = page_numbers([(vma.start, vma.end) for vma in vmas], geometry.page_size)[:, 0]
        parts = [self._changed(columns, first) for columns in self._watch.look(segments)]
        # Ranges that are not read any more must be marked as empty, or they would stay in the recording.
        if segments != self._looked:
            parts.append(self._emptied(segments))
            self._looked = segments
        runs = RunTable.joined([part for part in parts if len(part)])
        counters = abilities.counters(self._space)
        if changed := {name: value for name, value in counters.items() if self._counters.get(name) != value}:
            meta["counters"] = changed
        self._counters = counters
        self._number += 1
        return meta, runs[np.argsort(runs.first, kind="stable")]

    def _mappings(self) -> Meta:
        """Return the changes of the mappings and of the machine, if it is time to read them."""
        mapped = self._space.mapped()
        # Listing mappings with all their properties makes the kernel walk the whole address space.
        if mapped == self._mapped and self._number % MAPPINGS_EVERY:
            return {}
        meta: Meta = {}
        now = {vma.start: vma for vma in self._space.vmas()}
        if gone := [start for start in self._vmas if start not in now]:
            meta["vmas_gone"] = gone
        # Also a mapping that kept its start and changed otherwise: readers replace it.
        if new := [vma_to_json(vma) for start, vma in now.items() if self._vmas.get(start) != vma]:
            meta["vmas"] = new
        self._mapped, self._vmas = mapped, now
        values = _changing(describe(self._space, ()))
        if changed := {key: value for key, value in values.items() if self._values[key] != value}:
            meta["changed"] = changed
        self._values = values
        return meta

    def _changed(self, columns: PteColumns, vma_first: NDArray[np.int64]) -> RunTable:
        """Return the runs of those PMD ranges in `columns` that differ from the runs written last."""
        geometry = self._space.geometry
        # So that no run crosses a border, and each range can be replaced on its own.
        cut = tuple(_by_range(columns.segments, geometry))
        runs = encode(replace(columns, segments=cut), vma_first, geometry.page_size)
        n = geometry.ptes_per_pmd
        ranges = np.unique([start // geometry.pmd_size for start, _ in cut])
        sums = np.zeros(len(ranges), np.uint64)
        index = np.searchsorted(ranges, runs.first // n)
        # A sum, so that the order of the runs does not matter.
        np.add.at(sums, index, _mixed(runs))
        differs = np.zeros(len(ranges), np.bool_)
        emptied = []
        for at, (number, total) in enumerate(zip(ranges.tolist(), sums.tolist(), strict=True)):
            # Only the sum of the runs that were written last is kept: runs themselves would need memory for all of the
            # target.
            if self._sums.get(number, 0) != total:
                differs[at] = True
                if total:
                    self._sums[number] = total
                else:
                    del self._sums[number]
                    emptied.append(number)
        return RunTable.joined([runs[differs[index]], _nothing_in(emptied, n)])

    def _emptied(self, segments: Sequence[Segment]) -> RunTable:
        """Return an empty run for every PMD range that was written and does not lie in `segments` any more."""
        size = self._space.geometry.pmd_size
        known = np.array(sorted(self._sums), np.int64)
        spans = np.array([(start // size, -(-end // size)) for start, end in segments], np.int64).reshape(-1, 2)
        at = np.searchsorted(spans[:, 1], known, side="right")
        inside = at < len(spans)
        inside[inside] &= spans[at[inside], 0] <= known[inside]
        gone: list[int] = known[~inside].tolist()
        for number in gone:
            del self._sums[number]
        return _nothing_in(gone, self._space.geometry.ptes_per_pmd)


def _changing(description: Description) -> dict[str, Any]:
    """Return the values of a description that may change from step to step."""
    values: dict[str, Any] = json.loads(description.to_json())
    return {key: values[key] for key in CHANGING}


def _by_range(segments: Sequence[Segment], geometry: Geometry) -> Iterator[Segment]:
    """Yield `segments`, cut at the borders of PMD ranges."""
    size = geometry.pmd_size
    for start, end in segments:
        while start < end:
            stop = min(end, (start // size + 1) * size)
            yield start, stop
            start = stop


def _nothing_in(numbers: list[int], ptes: int) -> RunTable:
    """Return runs that mark PMD ranges, by number, as empty."""
    count = len(numbers)
    return RunTable(
        np.zeros(count, np.int32),
        np.array(numbers, np.int64) * ptes,
        np.full(count, ptes, np.int64),
        np.zeros(count, np.uint16),
        np.full(count, ORDER_NONE, np.int8),
    )


def _mixed(runs: RunTable) -> NDArray[np.uint64]:
    """Return a 64-bit hash of each run, never 0."""
    # Multiplication mixes upwards only, and shifts bring the high bits down again, as in SplitMix64.
    mixed: NDArray[np.uint64] = runs.first.astype(np.uint64)
    for column in (runs.pages, runs.state, runs.folio_order):
        mixed ^= mixed >> np.uint64(31)
        mixed *= np.uint64(0x9E37_79B9_7F4A_7C15)
        mixed += column.astype(np.int64).view(np.uint64)
    mixed ^= mixed >> np.uint64(29)
    mixed *= np.uint64(0xBF58_476D_1CE4_E5B9)
    # 0 stands for a range without runs.
    return mixed | np.uint64(1)
