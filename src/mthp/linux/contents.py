"""Find the pages of a process that contain only zeroes; mthp reads contents for no other purpose.

The bytes come from /proc/PID/mem, piece by piece into one buffer, and are not kept. Unreadable pages count as not zero.
The kernel records the access as any other.
"""

from __future__ import annotations

import errno
import os

import numpy as np
from numpy.typing import NDArray

from mthp.closing import Closing
from mthp.linux.process import Process
from mthp.ptes import Pte, PteColumns, Segment

PIECE = 4 << 20
"""Bytes read at a time: few enough to stay in a processor's cache until they are checked."""

_GONE = frozenset({errno.EIO, errno.EFAULT, errno.ENOMEM})
"""Errors of pread of /proc/PID/mem for a page that is gone, or has a guard in its place."""


class Contents(Closing):
    """A reader of the contents of a process.

    Args:
        page_size: bytes of a base page.
        piece: bytes to read at a time, a multiple of `page_size`.
    """

    def __init__(self, process: Process, page_size: int, piece: int = PIECE) -> None:
        self._process = process
        self._page_size = page_size
        self._file = process.open("mem")
        self._buffer = memoryview(bytearray(piece))
        self._words = np.frombuffer(self._buffer, np.uint64)

    def zero_filled(self, columns: PteColumns) -> NDArray[np.bool_]:
        """Return which present pages of `columns` contain only zeroes: bool, shape (pages,)."""
        zero = columns.has(Pte.PRESENT) & columns.has(Pte.ZERO)
        # Only what was present a moment ago: a read would fill holes. For a page freed since, the kernel maps the zero
        # page, and one that was swapped out is read back, so no byte that the process sees changes.
        wanted = columns.has(Pte.PRESENT) & ~zero
        at = 0
        for start, end in columns.segments:
            pages = slice(at, at + (end - start) // self._page_size)
            edges = np.flatnonzero(np.diff(wanted[pages], prepend=False, append=False))
            for first, last in edges.reshape(-1, 2).tolist():
                where = start + first * self._page_size, start + last * self._page_size
                zero[at + first : at + last] = self._look(where)
            at = pages.stop
        # A process that has exited reads as empty.
        self._process.check_alive()
        return zero

    def _look(self, segment: Segment) -> NDArray[np.bool_]:
        """Return which pages of a segment contain only zeroes; False for unreadable pages."""
        size = self._page_size
        zero = np.zeros((segment[1] - segment[0]) // size, np.bool_)
        address = segment[0]
        while address < segment[1]:
            wanted = min(len(self._buffer), segment[1] - address)
            got = self._read(address, wanted) // size
            words = self._words[: got * size // 8].reshape(got, size // 8)
            first = (address - segment[0]) // size
            # Most pages have a nonzero byte near their start, and are not read to their end.
            maybe = np.flatnonzero(~words[:, :8].any(axis=1))
            zero[first + maybe] = np.bitwise_or.reduce(words[maybe], axis=1) == 0
            # Skip a page that cannot be read.
            address += (got or 1) * size
        return zero

    def _read(self, address: int, size: int) -> int:
        """Read as many bytes as possible into the buffer; return their number."""
        try:
            # Protections have no effect, unless the kernel checks them (proc_mem.force_override, Linux 6.12).
            return os.preadv(self._file, [self._buffer[:size]], address)
        except OSError as error:
            if error.errno in _GONE:
                return 0
            self._process.fail(error, "its memory")

    def close(self) -> None:
        os.close(self._file)
