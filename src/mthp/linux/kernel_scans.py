"""Watch the kernel's scans of the PMD ranges of one process, by its tracepoints.

An event of a scan names the address space by a pointer, which a program cannot resolve, and the range by the frame of
the page at which the scan ended. So the frames of the process determine which pointer is its own, and which range was
scanned. That takes 16 bytes of memory a page.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mthp.errors import TargetVanishedError
from mthp.linux.heat import PATIENCE, anonymous_segments
from mthp.linux.heat.frames import Frames, frames_of
from mthp.linux.kernelfiles import text_of
from mthp.linux.processspace import ProcessSpace
from mthp.linux.tracepoints import Event, Tracepoints, read_formats, tracefs
from mthp.ptes import Segment
from mthp.results import ScanResult

SCAN = "mm_khugepaged_scan_pmd"
COLLAPSE = "mm_collapse_huge_page"
ISOLATE = "mm_collapse_huge_page_isolate"

KHUGEPAGED = "khugepaged"
"""The name of the kernel thread."""

SHOWN = 3
"""Ranges that a sentence names."""

_FIRST_PID_NAMESPACE = "pid:[4026531836]"
"""PROC_PID_INIT_INO (include/linux/proc_ns.h). Events have PIDs of that namespace."""

_BY_WORD = {result.trace_word: result for result in ScanResult}


@dataclass(frozen=True, slots=True)
class Scan:
    """One scan of a PMD range.

    Attributes:
        space: the kernel's pointer to the address space.
        frame: frame at which the scan ended; a nonexistent one if it found no page.
        by: the thread: "khugepaged", or name and PID of one that called MADV_COLLAPSE; "" if unknown.
        word: the kernel's word for the result.
        collapsing: whether the whole range was scanned and its collapse begun.
    """

    space: int
    frame: int
    by: str
    word: str
    collapsing: bool

    @property
    def outcome(self) -> str:
        """Return the result in words for users."""
        result = _BY_WORD.get(self.word)
        if result is ScanResult.SUCCEED:
            return "collapsed"
        meaning = f"{result.name}: {result.meaning}" if result is not None else self.word.replace("_", " ")
        return f"left alone, {meaning}" + (" (while it was being collapsed)" if self.collapsing else "")


@dataclass(frozen=True, slots=True)
class Watched:
    """The result of watching a process.

    Attributes:
        scans: scans of the process, each with the address of its range; None where no page determines it.
        others: number of scans of other processes.
        lost: number of events that came too fast.
        visible: whether the process has pages of its own by which its scans can be identified.
        sleep_ms: khugepaged's rest between two passes, in milliseconds.
    """

    seconds: float
    scans: tuple[tuple[int | None, Scan], ...]
    others: int
    lost: int
    visible: bool
    sleep_ms: str

    @property
    def sentences(self) -> list[str]:
        """Return the result in sentences for users."""
        lines = list(self._described())
        if self.lost:
            lines.append(f"{self.lost} events were lost, because they came faster than they could be read")
        return lines

    def _described(self) -> Iterator[str]:
        begin = f"in {self.seconds:.0f} s of watching"
        if not self.visible:
            yield f"{begin} no scan could be attributed: no page that khugepaged may scan is of this process alone"
            return
        if not self.scans:
            rest = f"; khugepaged rests {self.sleep_ms} ms after each pass" if self.sleep_ms else ""
            yield f"{begin} the kernel scanned nothing here, and {self.others} times in other processes{rest}"
            return
        grouped: dict[tuple[str, str], list[int | None]] = {}
        for address, scan in self.scans:
            grouped.setdefault((scan.by, scan.outcome), []).append(address)
        for (by, outcome), addresses in grouped.items():
            agent = by if by in ("", KHUGEPAGED) else f"MADV_COLLAPSE of {by}"
            ranges = list(dict.fromkeys(address for address in addresses if address is not None))
            where = ", ".join(f"{address:#x}" for address in ranges[:SHOWN])
            where += f" and {len(ranges) - SHOWN} more" if len(ranges) > SHOWN else ""
            times = "once" if len(addresses) == 1 else f"{len(addresses)} times"
            at = f" at {where}" if where else " where it names no page"
            yield f"{begin} {agent or 'the kernel'} scanned {times}{at}: {outcome}"


def watch_scans(
    space: ProcessSpace,
    seconds: float,
    *,
    within: Segment | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Watched:
    """Watch the kernel's scans of `space` for `seconds`. Nothing is changed.

    Args:
        within: the PMD range of interest; all anonymous memory if not given.
        progress: called with the elapsed and the total milliseconds.

    Raises:
        NotPermittedError, UnsupportedError, MthpError: these rights, or this kernel, show no tracepoints.
        TargetVanishedError: the process is gone.
    """
    formats = read_formats(tracefs(), "huge_memory", (SCAN, COLLAPSE, ISOLATE))
    known = [_frames(space, within)]
    threads, visits, begin = Threads(), Visits(), time.monotonic()
    with Tracepoints(formats) as events:
        while (over := time.monotonic() - begin) < seconds:
            # Read often: the ring of each processor holds some 700 records.
            time.sleep(min(PATIENCE, seconds - over))
            visits.take(events.read(), threads)
            progress(int(1000 * over), int(1000 * seconds))
        over = time.monotonic() - begin
        visits.take(events.read(), threads)
        lost = events.lost
    # Pages may have come or moved meanwhile.
    with contextlib.suppress(TargetVanishedError):
        known.append(_frames(space, within))
    scans, others = attributed(visits.scans, known, space.geometry.pmd_size, within)
    visible = any(len(each.frame) for each in known)
    return Watched(over, scans, others, lost, visible, space.sysfs.text("khugepaged/scan_sleep_millisecs") or "")


def _frames(space: ProcessSpace, within: Segment | None) -> Frames:
    segments = anonymous_segments(space) if within is None else space.populated([within], space.geometry.page_size)
    # A frame that others map, too, could stand for any of them.
    frames = frames_of(space, segments, shared=False)
    # For a binary search by frame; of equal frames the first address counts.
    order = np.argsort(frames.frame, kind="stable")
    return Frames(frames.address[order], frames.frame[order])


class Threads:
    """The names of threads, by the TIDs of events."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._names: dict[int, str] = {}
        try:
            # Elsewhere the TIDs of events are not those of /proc here.
            self._visible = (proc / "self/ns/pid").readlink().name == _FIRST_PID_NAMESPACE
        except OSError:
            self._visible = False

    def __getitem__(self, tid: int) -> str:
        if not self._visible:
            return ""
        if tid not in self._names:
            comm = text_of(self._proc / str(tid) / "comm")
            name = "a process that is gone" if comm is None else comm
            self._names[tid] = name if name == KHUGEPAGED else f"{name} ({tid})"
        return self._names[tid]


@dataclass(slots=True)
class Visits:
    """Joined events of each thread: attempts to collapse, then the scan that they belong to."""

    scans: list[Scan] = field(default_factory=list)
    _attempts: Counter[int] = field(default_factory=Counter)

    def take(self, events: Sequence[Event], threads: Threads) -> None:
        """Take further events, in their order."""
        for event in events:
            values = event.values
            tid = int(values["common_pid"])
            # The event of the scan comes last, with the result of both (collapse_scan_pmd() in 7.3, mm/khugepaged.c).
            if event.name != SCAN:
                # An attempt comes before the scan that it belongs to, in the same thread.
                self._attempts[tid] += 1
                continue
            collapsing = self._attempts.pop(tid, 0) > 0
            scan = Scan(int(values["mm"]), int(values["pfn"]), threads[tid], str(values["status"]), collapsing)
            self.scans.append(scan)


def attributed(
    scans: Sequence[Scan], known: Sequence[Frames], size: int, within: Segment | None
) -> tuple[tuple[tuple[int | None, Scan], ...], int]:
    """Return the scans of the process that has the frames `known`, with their PMD ranges, and the number of others.

    A frame may have gone to another process meanwhile, so the address space that had most of them is the process's.

    Args:
        known: frames in ascending order, at several times.
        size: size of a PMD range in bytes.
        within: the range of interest; scans of other ranges are left out.
    """
    addresses = [_address(scan.frame, known) for scan in scans]
    spaces = Counter(scan.space for scan, address in zip(scans, addresses, strict=True) if address is not None)
    own = spaces.most_common(1)[0][0] if spaces else None
    found: list[tuple[int | None, Scan]] = []
    others = 0
    for scan, address in zip(scans, addresses, strict=True):
        start = None if address is None else address // size * size
        if scan.space != own:
            others += 1
        elif within is None or start is not None:
            found.append((start, scan))
    return tuple(found), others


def _address(frame: int, known: Sequence[Frames]) -> int | None:
    for frames in known:
        at = int(np.searchsorted(frames.frame, np.uint64(frame)))
        if at < len(frames.frame) and int(frames.frame[at]) == frame:
            return int(frames.address[at])
    return None
