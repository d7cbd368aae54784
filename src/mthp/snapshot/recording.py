"""A recording, opened: its steps, and the address space at each of them.

In addition to its runs (:mod:`mthp.snapshot.stream`), a step has these keys, all relative to the step before:

``seconds``      seconds since the first step
``cpu_seconds``  processor seconds used to take it
``vmas``         mappings that are new, or changed; by ``start``
``vmas_gone``    addresses of mappings that were removed
``counters``     the machine's counters that changed (:meth:`mthp.abilities.Counting.counters`)
``changed``      keys of the description with a new value: switches, tunables, ...
``accesses``     of a recording made from a trace: the pages used, in order (:func:`packed_pages`)

A recording that was cut off in the middle, because its writer was killed or its disk full, has all steps before.
"""

from __future__ import annotations

import base64
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mthp.abilities import Accesses
from mthp.bounded import inflate, named
from mthp.errors import UsageError
from mthp.ptes import PteColumns, Segment, page_numbers
from mthp.snapshot.bounds import ACCESSES, COUNTERS, MAPPINGS, RUNS, STEPS
from mthp.snapshot.description import Description
from mthp.snapshot.formats import stream_reader
from mthp.snapshot.recorded import RecordedSpace
from mthp.snapshot.runs import RunTable, decode, granules
from mthp.snapshot.stream import Meta
from mthp.units import parse_duration

CHANGING = ("switches", "tunables", "thp_disabled", "missing")
"""Keys of the description that may change from step to step."""

_PENDING = 64
"""Most steps with runs that are merged at a time."""


@dataclass(frozen=True, slots=True)
class RecordingStep:
    """One step of a recording.

    Attributes:
        number: 0 for the first.
        seconds: seconds since the first step.
        cpu_seconds: processor seconds used to take it.
        counters: the machine's counters at the step, by name.
        rows: number of runs that it stored.
    """

    number: int
    seconds: float
    cpu_seconds: float
    counters: dict[str, int] = field(repr=False)
    rows: int


class Recording:
    """A recording.

    Opening it reads the file once, to find its end; each space is read from the file again.

    Attributes:
        path: path of the file.
        description: description of the target at the beginning, without mappings.
        steps: all complete steps, at least one.
        end: why it ended; ``""`` if it was cut off.
        traced: whether it was made from a trace of accesses.
        trouble: a message for the user about its end; ``""`` if none.

    Raises:
        UsageError: not a recording, or cut off before the end of its first step.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._reader = stream_reader(path)
        self.description = self._reader.description
        self.end, self.traced = "", False
        steps: list[RecordingStep] = []
        reason = "it has no end"
        counters: dict[str, int] = {}
        for meta, runs in self._reader.steps():
            if "end" in meta:
                self.end = str(meta["end"])
            elif "broken" in meta:
                reason = str(meta["broken"])
            else:
                if changed := _checked(self.path, meta, "counters", dict, {}):
                    counters = counters | _checked_counters(self.path, changed)
                    with named(self.path):
                        COUNTERS.check(len(counters))
                self.traced |= "accesses" in meta
                with named(self.path):
                    STEPS.check(len(steps) + 1)
                seconds = float(_checked(self.path, meta, "seconds", (int, float), 0.0))
                cpu_seconds = float(_checked(self.path, meta, "cpu_seconds", (int, float), 0.0))
                steps.append(RecordingStep(len(steps), seconds, cpu_seconds, counters, len(runs)))
        if not steps:
            raise UsageError(f"{self.path}: cut off before the end of its first step: {reason}")
        self.steps: tuple[RecordingStep, ...] = tuple(steps)
        self.trouble = ""
        # The writer was killed, or the disk was full: all steps before are whole.
        if not self.end:
            last = self.steps[-1]
            self.trouble = (
                f"{self.path} was cut off ({reason}): its {len(self.steps)} steps up to {last.seconds:g} s are whole"
            )

    def step_at(self, text: str | None) -> int:
        """Return the number of the step that `text` selects; the last for None.

        Args:
            text: a number, counted from the end if it is negative; or a time from the beginning, such as ``30s``,
                which selects the last step by then.

        Raises:
            UsageError: the text is neither, or the step does not exist.
        """
        if text is None:
            return len(self.steps) - 1
        if not re.fullmatch(r"-?[0-9]{1,18}", text):
            return self._step_by(text)
        number = int(text)
        if not -len(self.steps) <= number < len(self.steps):
            raise UsageError(
                f"{self.path} has no step {number}",
                help=f"it has {len(self.steps)}, 0 to {len(self.steps) - 1}, over {self.steps[-1].seconds:g} s",
            )
        return number % len(self.steps)

    def _step_by(self, text: str) -> int:
        """Return the number of the last step by a time from the beginning."""
        try:
            wanted = parse_duration(text) / 1e9
        except UsageError as error:
            remedy = "use its number, or a time such as 30s or 5m"
            raise UsageError(f"{text!r} is not a step of a recording", help=remedy) from error
        last = self.steps[-1].seconds
        # The last step shows the memory until the next would have come: a recording of 30 s ends with a step before.
        interval = last / max(1, len(self.steps) - 1)
        if wanted > last + interval:
            raise UsageError(
                f"{self.path} has no step at {text}: its last step is at {last:g} s",
                help=f"use a time up to {last:g}s, or --at -1 for the last step",
            )
        return max(0, sum(step.seconds <= wanted for step in self.steps) - 1)

    def space(self, number: int = -1) -> RecordingSpace:
        """Return the address space at a step.

        Raises:
            IndexError: the step does not exist.
            UsageError: the file has an invalid value.
        """
        # An index as that of a list: negative from the end, or IndexError.
        number = range(len(self.steps))[number]
        state = _State(self)
        # From the beginning: a step holds only what has changed since the one before.
        for at, (meta, runs) in enumerate(self._reader.steps()):
            state.add(meta, runs)
            if at == number:
                break
        space = state.space(self.steps[number])
        # Only the last step may be meant as the end of the target; those before it are whole.
        return space.noting(self.trouble) if self.trouble and number == len(self.steps) - 1 else space

    def walk(self) -> Iterator[RecordingSpace]:
        """Yield the address space at every step; much less work than a call of :meth:`space` for each."""
        state = _State(self)
        for step, (meta, runs) in zip(self.steps, self._reader.steps(), strict=False):
            state.add(meta, runs)
            yield state.space(step)

    def accesses(self) -> Iterator[NDArray[np.int64]]:
        """Yield the page numbers used in each step, in order, if the recording was made from a trace."""
        for _, (meta, _) in zip(self.steps, self._reader.steps(), strict=False):
            if "accesses" in meta:
                yield unpacked_pages(self.path, meta["accesses"])


class RecordingSpace(RecordedSpace):
    """The address space at one step of a recording.

    Args:
        runs: all runs at the step, by ascending address.
        accesses: yields the page numbers used in the whole recording, in order; None if no trace was recorded.
    """

    def __init__(
        self,
        description: Description,
        runs: RunTable,
        step: RecordingStep,
        path: str,
        accesses: Accesses | None = None,
    ) -> None:
        super().__init__(description, path, "recording")
        self._runs, self._accesses = runs, accesses
        self.step = step

    def noting(self, remark: str) -> RecordingSpace:
        """Return the same space with another remark for the user."""
        description = replace(self._description, missing=(*self._description.missing, remark))
        return RecordingSpace(description, self._runs, self.step, self._path, self._accesses)

    def accesses(self) -> Accesses | None:
        """Return the trace that the recording was made from; None if it was made otherwise."""
        return self._accesses

    def counters(self) -> dict[str, int]:
        """Return the counters as recorded."""
        return dict(self.step.counters)

    def read(self, segments: Sequence[Segment]) -> PteColumns:
        """Return the entries of `segments` as recorded; addresses that were not mapped then are none."""
        spans = page_numbers(segments, self.geometry.page_size)
        state, folio_order = decode(self._runs, spans)
        return PteColumns(tuple(segments), state, folio_order)

    def populated(self, segments: Sequence[Segment], granule: int) -> list[Segment]:
        """Return the parts of `segments` that hold runs, in aligned granules, clipped to their segment."""
        page_size = self.geometry.page_size
        found = granules(self._runs, page_numbers(segments, page_size), max(1, granule // page_size))
        return [(first * page_size, end * page_size) for _, first, end in found.tolist()]


class _State:
    """State after some steps."""

    def __init__(self, recording: Recording) -> None:
        self._path, self._accesses = recording.path, recording.accesses if recording.traced else None
        self._geometry = recording.description.geometry
        self._says: dict[str, Any] = json.loads(recording.description.to_json())
        self._vmas: dict[int, Any] = {}
        self._runs = RunTable.joined([])
        self._pending: list[RunTable] = []

    def add(self, meta: Meta, runs: RunTable) -> None:
        """Apply one step."""
        for start in _checked(self._path, meta, "vmas_gone", list, []):
            if not isinstance(start, int):
                raise UsageError(f"{self._path}: damaged: a mapping that is gone has no address")
            self._vmas.pop(start, None)
        for vma in _checked(self._path, meta, "vmas", list, []):
            if not isinstance(vma, dict) or not isinstance(vma.get("start"), int):
                raise UsageError(f"{self._path}: damaged: a mapping without a start")
            self._vmas[vma["start"]] = vma
        changed = _checked(self._path, meta, "changed", dict, {})
        # Only these keys: a file must not change the geometry in its middle.
        self._says |= {key: changed[key] for key in CHANGING if key in changed}
        self._pending.append(runs)
        with named(self._path):
            MAPPINGS.check(len(self._vmas))
            # Merging sorts all runs: not after every step, but before they need too much memory.
            if len(self._pending) >= _PENDING or sum(map(len, self._pending)) >= RUNS.now:
                self._put_together()
                RUNS.check(len(self._runs))

    def space(self, step: RecordingStep) -> RecordingSpace:
        """Return the current address space."""
        self._put_together()
        vmas = [self._vmas[start] for start in sorted(self._vmas)]
        if _overlap(self._runs):
            raise UsageError(f"{self._path}: damaged: runs that overlap")
        with named(self._path):
            # They do not overlap, so their sum fits 64 bits.
            pages = int(self._runs.pages.sum())
            description = Description.from_data(self._says | {"vmas": vmas, "pages": pages})
        return RecordingSpace(description, self._runs, step, self._path, self._accesses)

    def _put_together(self) -> None:
        """Keep, of every PMD range, the runs of the last step that stored it."""
        parts = [self._runs, *self._pending]
        self._pending = []
        if not any(len(part) for part in parts[1:]):
            return
        runs = RunTable.joined(parts)
        age = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        order = np.argsort(runs.first, kind="stable")
        runs, age = runs[order], age[order]
        ranges = runs.first // self._geometry.ptes_per_pmd
        begins = np.flatnonzero(np.diff(ranges, prepend=-1))
        # A step stores all runs of a range that has changed, so those of earlier steps are void.
        latest = np.repeat(np.maximum.reduceat(age, begins), np.diff(begins, append=len(age)))
        # A run of state 0 has only marked its range as empty.
        self._runs = runs[(age == latest) & (runs.state != 0)]


def _overlap(runs: RunTable) -> bool:
    return bool((runs.first[1:] < runs.end[:-1]).any() or (runs.pages < 1).any())


def _checked(path: str, meta: Meta, key: str, kind: Any, default: Any) -> Any:
    value = meta.get(key, default)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UsageError(f"{path}: damaged: {key!r} of a step is not valid")
    return value


def _checked_counters(path: str, counters: dict[str, Any]) -> dict[str, int]:
    if not all(isinstance(value, int) and not isinstance(value, bool) for value in counters.values()):
        raise UsageError(f"{path}: damaged: a counter of a step is not a whole number")
    return counters


def packed_pages(pages: NDArray[np.int64]) -> str:
    """Return page numbers as text: differences between neighbours, int64, deflated, base 64."""
    # Differences are small and repeat, and so compress well.
    return base64.b64encode(zlib.compress(np.diff(pages, prepend=np.int64(0)).tobytes(), 3)).decode()


def unpacked_pages(path: str, text: object) -> NDArray[np.int64]:
    """Return the page numbers that :func:`packed_pages` packed.

    Raises:
        UsageError: the text is not valid.
    """
    with named(path):
        try:
            data = base64.b64decode(text if isinstance(text, str) else "!", validate=True)
            pages = np.cumsum(np.frombuffer(inflate(data, ACCESSES, unit=8), np.int64))
        except UsageError:
            raise
        except ValueError as error:
            raise UsageError("damaged: the accesses of a step are not valid") from error
        # 64 bits of address less 12 of the smallest page.
        if (pages < 0).any() or (pages >= 1 << 52).any():
            raise UsageError("damaged: the accesses of a step lie outside of the address space")
    return pages
