"""Which pages of a process hold nothing but zeroes: the one thing that mthp reads contents for.

The bytes come from /proc/PID/mem, piece by piece into one buffer, and nothing is kept. It reads through protections,
where the kernel lets others than tracers do so (proc_mem.force_override, since Linux 6.12); pages that cannot be read
count as not zero.
Only pages that were there a moment ago are read. One that was swapped out since is read back, and for one that was
freed since the kernel maps the zero page, so no byte that the process sees changes; that its pages were used just now
the kernel notes as for any access.
"""

from __future__ import annotations

import errno
import os

import numpy as np
from numpy.typing import NDArray

from mthp.linux.process import Process
from mthp.ptes import Pte, PteColumns, Segment

PIECE = 4 << 20
"""Bytes read at a time: few enough to stay in a processor's cache until they are looked at."""

_GONE = frozenset({errno.EIO, errno.EFAULT, errno.ENOMEM})
"""What pread of /proc/PID/mem says of a page that is not there any more, or has a guard in its place."""


class Contents:
    """The contents of a process, to be closed after use."""

    def __init__(self, process: Process, page_size: int) -> None:
        self._process = process
        self._page_size = page_size
        self._file = process.open("mem")
        self._buffer = memoryview(bytearray(PIECE))
        self._words = np.frombuffer(self._buffer, np.uint64)

    def zero_filled(self, columns: PteColumns) -> NDArray[np.bool_]:
        """Which present pages of `columns` hold nothing but zeroes: bool, shape (pages,)."""
        zero = columns.has(Pte.PRESENT) & columns.has(Pte.ZERO)
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
        """Which pages of a segment hold nothing but zeroes; False for what cannot be read."""
        size = self._page_size
        zero = np.zeros((segment[1] - segment[0]) // size, np.bool_)
        address = segment[0]
        while address < segment[1]:
            wanted = min(PIECE, segment[1] - address)
            got = self._read(address, wanted) // size
            words = self._words[: got * size // 8].reshape(got, size // 8)
            first = (address - segment[0]) // size
            # Most pages have something at their beginning, and are not read to their end.
            maybe = np.flatnonzero(~words[:, :8].any(axis=1))
            zero[first + maybe] = np.bitwise_or.reduce(words[maybe], axis=1) == 0
            # A page that cannot be read is passed over.
            address += (got or 1) * size
        return zero

    def _read(self, address: int, size: int) -> int:
        """Read into the buffer as far as it goes; gives how many bytes there were."""
        try:
            return os.preadv(self._file, [self._buffer[:size]], address)
        except OSError as error:
            if error.errno in _GONE:
                return 0
            self._process.fail(error, "its memory")

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
