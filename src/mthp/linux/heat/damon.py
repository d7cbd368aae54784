"""Measure accesses by DAMON: the kernel samples one page of every region, at every interval.

mthp makes an instance of its own in sysfs (Documentation/admin-guide/mm/damon/usage.rst), with fixed regions: the
virtual addresses of the target's anonymous memory (``fvaddr``), or where the kernel has only physical ones (``paddr``)
the frames behind it. Its scheme (``stat``) only lists the regions with their accesses (``tried_regions``, Linux 6.2).

mthp makes its kdamond only where there is none. It is in the journal under a mark
(:mod:`mthp.linux.journal.instance`), so that it ends with mthp, however that ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import secrets
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mthp.errors import MthpError, NotPermittedError, UnsupportedError
from mthp.heat import Heat
from mthp.linux.heat import MAX_SHARE, Stop, anonymous_segments, not_permitted, pmd_pieces
from mthp.linux.heat.frames import frame_segments, frames_of, to_virtual
from mthp.linux.journal.instance import INSTANCE, NONE, kdamonds_of, read_instance, write_file
from mthp.linux.journal.store import all_roots
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.processspace import ProcessSpace
from mthp.linux.sysfs import ThpSysfs
from mthp.ptes import Segment

MOST_PIECES = 1024
"""Initial number of regions at most: enough to monitor 2 GiB of x86-64 PMD range by PMD range."""

SHORTEST_SAMPLE, LONGEST_SAMPLE = 0.005, 0.5
"""Seconds from one sample to the next."""

CHECK_SECONDS = {"fvaddr": 2e-6, "paddr": 6e-6}
"""Initial estimate of the seconds for one sample of one region; the kdamond's processor time corrects it."""

SAMPLES = 10
"""Samples in one aggregation, at least."""

AGGREGATION = 0.2
"""Shortest aggregation in seconds: reading all regions takes some milliseconds."""

EXCLUSIVE = ("damon_stat", "damon_reclaim", "damon_lru_sort")
"""Modules that do not permit another kdamond (damon_start(), mm/damon/core.c)."""

_ULONG_MAX = str((1 << 64) - 1)
_UINT_MAX = str((1 << 32) - 1)


def lack(mm: Path, modules: Path = Path("/sys/module")) -> tuple[str, str]:
    """Return why DAMON cannot be used now, and the remedy; empty texts if no reason is known.

    Args:
        mm: the directory ``/sys/kernel/mm``.
        modules: the directory ``/sys/module``.
    """
    kdamonds = mm / "damon/admin/kdamonds"
    if not kdamonds.is_dir():
        return "this kernel has no DAMON in sysfs", "a kernel with CONFIG_DAMON_SYSFS and CONFIG_DAMON_VADDR (5.18)"
    word = read_instance(kdamonds)
    if word is None:
        return "its files may not be read", "run as root"
    # sysfs has one list of the kdamonds of all programs: it cannot grow while one of them runs, and loses all of them
    # when it is resized (damon_sysfs_kdamonds_add_dirs(), mm/damon/sysfs.c).
    if word != NONE:
        what = "another program uses DAMON, and a second instance cannot be made beside it"
        return what, "stop that one first (damo stop), or use another source"
    for name in EXCLUSIVE:
        with contextlib.suppress(OSError):
            enabled = modules / name / "parameters/enabled"
            if enabled.read_text().strip() == "Y":
                return f"{name} is on, so no other kdamond can run", f"echo N > {enabled} (as root)"
    return "", ""


Regions = NDArray[np.uint64]
"""Start and end of regions in the monitored address space, and their hits, the samples of one aggregation that found
them used: uint64, shape (regions, 3)."""


class Damon:
    """DAMON as a source of accesses.

    Args:
        sysfs: the THP directory; that of DAMON is its sibling.
        root: directory of the journal; by default that of this user.
        operations: address spaces to monitor, of those in ``CHECK_SECONDS``: the first that the kernel has is used.
    """

    def __init__(
        self,
        sysfs: ThpSysfs | None = None,
        root: Path | None = None,
        operations: Iterable[str] = tuple(CHECK_SECONDS),
    ) -> None:
        self._sysfs = sysfs or ThpSysfs()
        self._kdamonds = kdamonds_of(self._sysfs.root)
        self._context = self._kdamonds / "0/contexts/0"
        self._root = root
        self._usable = tuple(operations)

    def measure(self, space: ProcessSpace, seconds: float, stop: Stop) -> Heat:
        what, remedy = lack(self._sysfs.root.parent)
        if what:
            kind = NotPermittedError if "may not be read" in what else UnsupportedError
            raise kind(f"DAMON: {what}", help=remedy)
        segments = anonymous_segments(space)
        journal = SwitchJournal(self._root or all_roots()[1], self._sysfs)
        # Above values that people choose (71 minutes), and random, so that no other program has it by chance.
        mark = str((1 << 32) + secrets.randbelow(1 << 48))
        with journal.settings({INSTANCE: mark}), self._errors(space):
            operations = self._operations()
            frames = None
            if operations == "paddr":
                frames = frames_of(space, segments)
                segments = frame_segments(frames, space.geometry.page_size, MOST_PIECES)
            if not segments:
                return _joined([], space.geometry.page_size)
            sample = self._set_up(space, operations, segments)
            parts, spent, took = self._watch(sample, seconds, stop)
        heat = _joined(parts, space.geometry.page_size)
        if frames is not None:
            heat = to_virtual(heat, frames, space)
        return dataclasses.replace(heat, source=f"damon ({operations})", seconds=took, cpu_seconds=spent)

    def _operations(self) -> str:
        """Choose the monitored address space, and return its name."""
        known = (self._context / "avail_operations").read_text().split()
        for operations in self._usable:
            if operations in known:
                self._write("operations", operations)
                return operations
        raise UnsupportedError(
            f"DAMON of this kernel has no usable operations: {', '.join(known) or 'none'}",
            help="a kernel with CONFIG_DAMON_VADDR (5.19)",
        )

    def _set_up(self, space: ProcessSpace, operations: str, segments: list[Segment]) -> float:
        """Set everything up and turn it on; return the seconds between two samples."""
        start, end = pmd_pieces(segments, space.geometry.pmd_size, MOST_PIECES)
        # Each sample checks every region once: the cost of a second grows with them, and falls with the interval.
        sample = CHECK_SECONDS[operations] * len(start) / MAX_SHARE
        sample = min(max(sample, SHORTEST_SAMPLE), LONGEST_SAMPLE)
        self._set_intervals(sample)
        few = max(len(start), 10)
        if int((end - start).max()) > space.geometry.pmd_size:
            # Regions are larger than a PMD range: DAMON splits them, and merges those with similar use.
            least, most = few // 4, 4 * few
        else:
            # DAMON splits no region above half of the maximum number (kdamond_split_regions(), mm/damon/core.c; 7.3
            # splits some of them, up to the maximum), and merges none beyond the size at the minimum number
            # (kdamond_merge_regions()).
            least, most = few, few + 10
        self._write("monitoring_attrs/nr_regions/max", str(most))
        self._write("monitoring_attrs/nr_regions/min", str(least))
        self._write("targets/nr_targets", "1")
        if operations != "paddr":
            self._write("targets/0/pid_target", str(space.process.pid))
        self._write("targets/0/regions/nr_regions", str(len(start)))
        for index, (low, high) in enumerate(zip(start.tolist(), end.tolist(), strict=True)):
            self._write(f"targets/0/regions/{index}/start", str(low))
            self._write(f"targets/0/regions/{index}/end", str(high))
        self._write("schemes/nr_schemes", "1")
        self._write("schemes/0/action", "stat")
        # The bounds of a new scheme are 0, with which it would list no region.
        for name, bound in (("sz", _ULONG_MAX), ("nr_accesses", _UINT_MAX), ("age", _UINT_MAX)):
            self._write(f"schemes/0/access_pattern/{name}/max", bound)
        self._state("on")
        return sample

    def _set_intervals(self, sample: float) -> None:
        """Set the intervals; the longer one first, because it may not be below the other."""
        aggregation = max(SAMPLES * sample, AGGREGATION)
        self._write("monitoring_attrs/intervals/aggr_us", str(int(aggregation * 1e6)))
        self._write("monitoring_attrs/intervals/sample_us", str(int(sample * 1e6)))

    def _watch(self, sample: float, seconds: float, stop: Stop) -> tuple[list[Regions], float, float]:
        """Read the regions until the time is over; return them, their processor seconds and the elapsed seconds."""
        begin, begun = time.monotonic(), time.process_time()
        pid = (self._kdamonds / "0/pid").read_text().strip()
        parts: list[Regions] = []
        cpu = 0.0
        while not stop() and time.monotonic() - begin < seconds:
            # The write returns after the end of an aggregation, with its results.
            self._state("update_schemes_tried_regions")
            parts.append(self._tried())
            cpu = _cpu_seconds(pid)
            # The initial estimate was too low for this machine: correct it by what the kernel thread has really used.
            if cpu > MAX_SHARE * (time.monotonic() - begin) and sample < LONGEST_SAMPLE:
                sample = min(2 * sample, LONGEST_SAMPLE)
                self._set_intervals(sample)
                self._state("commit")
        took = time.monotonic() - begin
        return parts, cpu + time.process_time() - begun, took

    def _tried(self) -> Regions:
        rows = [
            [int((region / name).read_text()) for name in ("start", "end", "nr_accesses")]
            for region in (self._context / "schemes/0/tried_regions").iterdir()
            if region.name.isdecimal()
        ]
        return np.array(rows, np.uint64).reshape(-1, 3)

    def _write(self, name: str, text: str) -> None:
        write_file(self._context / name, text)

    def _state(self, word: str) -> None:
        write_file(self._kdamonds / "0/state", word)

    @contextlib.contextmanager
    def _errors(self, space: ProcessSpace) -> Iterator[None]:
        """Turn errors of DAMON's files into errors with a remedy."""
        try:
            yield
        except OSError as error:
            space.process.check_alive()
            path = error.filename or self._kdamonds
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise not_permitted(Path(path), error) from error
            if error.errno == errno.EBUSY:
                raise UnsupportedError(
                    "DAMON: the kernel refuses a kdamond beside those that run",
                    help=f"turn off {', '.join(EXCLUSIVE)}: echo N > /sys/module/NAME/parameters/enabled (as root)",
                ) from error
            if error.errno == errno.ENOENT and "tried_regions" in str(path):
                raise UnsupportedError("DAMON of this kernel lists no regions", help="Linux 6.2 or later") from error
            raise MthpError(f"DAMON: {path}: {error.strerror}", help="use another source of heat") from error


def _joined(parts: list[Regions], page_size: int) -> Heat:
    """Return the accesses of all aggregations: a sample that found a region used counts for all of its pages."""
    start, end, hits = np.concatenate([np.empty((0, 3), np.uint64), *parts]).T
    return Heat.of_spans(start, end, hits.astype(np.float64) * ((end - start).astype(np.float64) / page_size))


def _cpu_seconds(pid: str) -> float:
    """Return the processor time of a kernel thread; 0.0 where it is not visible."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0
