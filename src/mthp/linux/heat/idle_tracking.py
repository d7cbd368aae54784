"""Measure accesses by idle page tracking (Documentation/admin-guide/mm/idle_page_tracking.rst).

A page is marked idle; an access removes the mark. Reclaim is not misled, because the kernel records the young bits that
it clears (page_idle_clear_pte_refs_one(), mm/page_idle.c). Each round checks a few other pages of each PMD range.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mthp.errors import NotPermittedError, UnsupportedError
from mthp.heat import Heat
from mthp.linux.heat import Stop, anonymous_segments, not_permitted, rounds
from mthp.linux.heat.frames import Frames, frames_of
from mthp.linux.processspace import ProcessSpace

BITMAP = "page_idle/bitmap"
"""The file below ``/sys/kernel/mm``: one bit for each frame, read and written in words of 64."""

PAGES_OF_RANGE = 8
"""Pages of each PMD range that are checked in one round."""

MOST_PAGES = 1 << 18
"""Limit of the pages in one round: about a second of processor time."""

_NO_FILE = "this kernel has no idle page tracking"
_A_KERNEL = "a kernel with CONFIG_IDLE_PAGE_TRACKING"


def lack(mm: Path) -> tuple[str, str]:
    """Return why idle page tracking cannot be used, and the remedy; empty texts if it can.

    Args:
        mm: the directory ``/sys/kernel/mm``.
    """
    if not (mm / BITMAP).exists():
        return _NO_FILE, _A_KERNEL
    if not os.access(mm / BITMAP, os.R_OK | os.W_OK):
        return "its bitmap may not be written", "run as root, with /sys mounted read-write"
    return "", ""


class IdlePages:
    """Idle page tracking as a source of accesses."""

    def __init__(self, mm: Path = Path("/sys/kernel/mm")) -> None:
        self._path = mm / BITMAP
        self._random = np.random.default_rng(0)

    def measure(self, space: ProcessSpace, seconds: float, stop: Stop) -> Heat:
        begin, begun = time.monotonic(), time.process_time()
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise UnsupportedError(f"idle page tracking: {_NO_FILE}", help=_A_KERNEL) from None
        except OSError as error:
            raise not_permitted(self._path, error) from error
        try:
            frames = frames_of(space, anonymous_segments(space))
            size = np.uint64(space.geometry.pmd_size)
            ranges, at, resident = np.unique(frames.address // size * size, return_inverse=True, return_counts=True)
            hits, looked = np.zeros(len(ranges)), np.zeros(len(ranges))
            chosen = self._marked(fd, frames, at)
            for _ in rounds(seconds, stop):
                used = ~_bits(fd, frames.frame[chosen])
                looked += np.bincount(at[chosen], minlength=len(ranges))
                hits += np.bincount(at[chosen], weights=used, minlength=len(ranges))
                chosen = self._marked(fd, frames, at)
            space.process.check_alive()
        except OSError as error:
            raise NotPermittedError(f"{self._path}: {error.strerror}", help="run as root") from error
        finally:
            os.close(fd)
        # From the pages that were checked to all pages of the range that are present.
        accesses = np.divide(hits * resident, looked, out=np.zeros(len(ranges)), where=looked > 0)
        return Heat.of_spans(
            ranges,
            ranges + size,
            accesses,
            source="idle page tracking",
            seconds=time.monotonic() - begin,
            cpu_seconds=time.process_time() - begun,
        )

    def _marked(self, fd: int, frames: Frames, at: NDArray[np.intp]) -> NDArray[np.intp]:
        """Choose pages and mark them as idle; return their indices, without those that have no mark."""
        chosen = self._chosen(at)
        _set_bits(fd, frames.frame[chosen])
        # Pages without a mark of their own read as used at once.
        # Only the first page of a large folio has one (page_idle_get_folio(), mm/page_idle.c).
        return chosen[_bits(fd, frames.frame[chosen])]

    def _chosen(self, at: NDArray[np.intp]) -> NDArray[np.intp]:
        """Choose some pages of each PMD range at random; return their indices.

        Args:
            at: the range of each page, ascending: intp, shape (pages,).
        """
        if not len(at):
            return np.empty(0, np.intp)
        first = np.flatnonzero(np.r_[True, np.diff(at) != 0])
        count = np.diff(np.r_[first, len(at)])
        # Marking a page walks all mappings of it, some microseconds each.
        each = max(1, min(PAGES_OF_RANGE, MOST_PAGES // len(first)))
        picked = first[:, None] + self._random.integers(0, count[:, None], (len(first), each))
        return np.unique(picked)


def _set_bits(fd: int, frames: NDArray[np.uint64]) -> None:
    """Mark frames as idle; the bits of others are 0, which does not change them."""
    words, at = np.unique(frames // np.uint64(64), return_inverse=True)
    bits = np.zeros(len(words), np.uint64)
    np.bitwise_or.at(bits, at, np.uint64(1) << (frames % np.uint64(64)))
    for word, value in zip(words.tolist(), bits, strict=True):
        try:
            os.pwrite(fd, value.tobytes(), 8 * word)
        except OSError as error:
            # The frame lies behind the last frame of memory, like those of devices (page_idle_bitmap_write()).
            if error.errno != errno.ENXIO:
                raise


def _bits(fd: int, frames: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Return which frames are still idle: bool, shape (frames,)."""
    words, at = np.unique(frames // np.uint64(64), return_inverse=True)
    read = b"".join(os.pread(fd, 8, 8 * word).ljust(8, b"\0") for word in words.tolist())
    bits = np.frombuffer(read, np.uint64)
    idle: NDArray[np.bool_] = (bits[at] >> (frames % np.uint64(64)) & np.uint64(1)).astype(np.bool_)
    return idle
