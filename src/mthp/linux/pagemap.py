"""Read ``/proc/PID/pagemap``: a 64-bit word for every page, and the PAGEMAP_SCAN ioctl, which returns runs instead.

The words are read in one large pread per segment. They show which pages are present, swapped, of a file, mapped by one
process only, write-protected by userfaultfd, or guard markers; and, with CAP_SYS_ADMIN, the page frame number (PFN),
with which /proc/kpageflags is read. They do not show which pages a PMD entry maps, and without PFNs not the zero page.
PAGEMAP_SCAN (Linux 6.7) shows both, skips empty page tables, and needs no rights beyond those for the file.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import sys
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.closing import Closing
from mthp.geometry import Geometry
from mthp.linux import abi
from mthp.linux.process import Process
from mthp.outline import HUGE, PRESENT, SWAP, ZERO, Outline, outline_of
from mthp.ptes import Pte, Segment

_REGIONS_PER_CALL = 8192
_NO_IOCTL = (errno.ENOTTY, errno.EINVAL, errno.ENOSYS)
_TOP_BYTE = 7 if sys.byteorder == "little" else 0


class Pagemap(Closing):
    """The pagemap file of one process.

    Args:
        process: the process; the caller keeps it open and closes it.

    Attributes:
        can_scan: whether this kernel has PAGEMAP_SCAN.

    Raises:
        UnsupportedError: a kernel without CONFIG_PROC_PAGE_MONITOR.
    """

    def __init__(self, process: Process) -> None:
        self.process = process
        self._page_size = os.sysconf("SC_PAGESIZE")
        self._fd = process.open("pagemap")
        self.can_scan = self._probe_scan()

    def read(self, segments: Sequence[Segment]) -> NDArray[np.uint64]:
        """Return the words of `segments`, one after another: uint64, shape (pages,). Unmapped pages have 0."""
        counts = [(end - start) // self._page_size for start, end in segments]
        words = np.empty(sum(counts), np.uint64)
        at = 0
        for (start, _), count in zip(segments, counts, strict=True):
            self._fill(words[at : at + count], start)
            at += count
        return words

    def word(self, address: int) -> int:
        """Return the word of one page, 0 where nothing is mapped: for few pages of a process known to be alive."""
        try:
            text = os.pread(self._fd, abi.PM_ENTRY_BYTES, address // self._page_size * abi.PM_ENTRY_BYTES)
        except OSError as error:
            self.process.fail(error, "pagemap")
        if not text:
            self.process.check_memory()
        return int.from_bytes(text, sys.byteorder)

    def _fill(self, words: NDArray[np.uint64], start: int) -> None:
        """Read the words from address `start` on into `words`."""
        done = 0
        reopened = False
        while done < len(words):
            offset = (start // self._page_size + done) * abi.PM_ENTRY_BYTES
            try:
                size = os.preadv(self._fd, [words[done:].data], offset)
            except OSError as error:
                self.process.fail(error, "pagemap")
            done += size // abi.PM_ENTRY_BYTES
            # The file returns no bytes if the process is exiting; if it has a new address space since execve(2),
            # while the file belongs to the old one; or if no process can have these addresses ([vsyscall]).
            if size == 0:
                self.process.check_memory()
                if reopened:
                    words[done:] = 0
                    return
                fd = self.process.open("pagemap")
                os.close(self._fd)
                self._fd, reopened = fd, True

    def scan(self, segment: Segment, *, any_of: int = 0, all_of: int = 0) -> Iterator[NDArray[np.uint64]]:
        """Yield runs of pages in `segment` that have one of the categories `any_of` and all of `all_of`.

        Only on a kernel with :attr:`can_scan`.

        Args:
            any_of, all_of: ``PAGE_IS_*`` of include/uapi/linux/fs.h; 0 for no such condition.

        Yields:
            Some runs: uint64, shape (runs, 3): start and end addresses, and their categories among those requested.
        """
        regions = np.zeros((_REGIONS_PER_CALL, 3), np.uint64)
        start, end = segment
        while start < end:
            try:
                count, walk_end = self._scan_once(regions, start, end, any_of, all_of)
            except OSError as error:
                if error.errno == errno.EFAULT:
                    # Above the addresses that a process can have.
                    break
                self.process.fail(error, "PAGEMAP_SCAN")
            if count:
                yield regions[:count].copy()
            if count < len(regions):
                # All was walked, whatever walk_end is: beyond 512 regions, the size of the kernel's buffer, it stays
                # where the buffer was last full (do_pagemap_scan, seen on 6.18).
                break
            start = walk_end
        self.process.check_alive()

    def _scan_once(
        self, regions: NDArray[np.uint64], start: int, end: int, any_of: int, all_of: int
    ) -> tuple[int, int]:
        """Make one call; return the number of regions, and the address to go on at if `regions` is full."""
        argument = bytearray(
            struct.pack(
                abi.PM_SCAN_ARG,
                *(abi.PM_SCAN_ARG_SIZE, 0, start, end, 0),
                *(regions.ctypes.data, len(regions), 0),
                *(0, all_of, any_of, any_of | all_of),
            )
        )
        count = fcntl.ioctl(self._fd, abi.PAGEMAP_SCAN, argument)
        (walk_end,) = struct.unpack_from("=Q", argument, abi.PM_SCAN_ARG_WALK_END)
        return count, walk_end

    def _probe_scan(self) -> bool:
        try:
            # Over the first page, where nothing is mapped (vm.mmap_min_addr): only the errno counts.
            self._scan_once(np.zeros((1, 3), np.uint64), 0, self._page_size, abi.PAGE_IS_PRESENT, 0)
        except OSError as error:
            if error.errno in _NO_IOCTL:
                return False
            self.process.fail(error, "PAGEMAP_SCAN")
        return True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def _state_of(top: int) -> int:
    """Return the :class:`~mthp.ptes.Pte` bits for the top byte of a pagemap word."""
    word = top << 56
    state = Pte(0)
    if word & abi.PM_PRESENT:
        state |= Pte.PRESENT
        if not word & abi.PM_MMAP_EXCLUSIVE:
            state |= Pte.SHARED
    elif word & (abi.PM_SWAP | abi.PM_UFFD_WP | abi.PM_GUARD_REGION):
        # A userfaultfd marker in hugetlbfs memory comes without the swap bit.
        state |= Pte.SWAP
    if word & abi.PM_UFFD_WP:
        state |= Pte.UFFD_WP
    if word & abi.PM_FILE:
        state |= Pte.FILE
    if word & abi.PM_GUARD_REGION:
        state |= Pte.GUARD
    return int(state)


_STATES = np.array([_state_of(top) for top in range(256)], np.uint16)


def states(words: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """Return the bits of :class:`~mthp.ptes.Pte` for pagemap words: uint16, the shape of `words`.

    A zero page becomes SHARED (a small one) or FILE (a huge one), as only its frame, or PAGEMAP_SCAN, identifies it.
    """
    # All flags lie in the top byte, so a table of 256 answers replaces a comparison for each flag.
    return _STATES.take(words.view(np.uint8)[_TOP_BYTE::8])


def can_see_pfns() -> bool:
    """Return whether this process may see page frame numbers: CAP_SYS_ADMIN in the first user namespace."""
    return bool(own_frame())


def own_frame() -> int:
    """Return the frame of a certainly present page of this process: private, anonymous and never merged.

    Without the right to see frame numbers, or without pagemap, it is 0.
    """
    page_size = os.sysconf("SC_PAGESIZE")
    # Not zero, so that KSM cannot have merged it with the zero page; it was just written, so it is present.
    witness = ctypes.create_string_buffer(b"\1")
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        text = os.pread(fd, abi.PM_ENTRY_BYTES, ctypes.addressof(witness) // page_size * abi.PM_ENTRY_BYTES)
    except OSError:
        return 0
    finally:
        os.close(fd)
    return int.from_bytes(text, sys.byteorder) & abi.PM_PFRAME_MASK


_KINDS = (
    (abi.PAGE_IS_PRESENT, PRESENT),
    (abi.PAGE_IS_HUGE, HUGE),
    (abi.PAGE_IS_PFNZERO, ZERO),
    (abi.PAGE_IS_SWAPPED, SWAP),
)
_ANY = abi.PAGE_IS_PRESENT | abi.PAGE_IS_SWAPPED | abi.PAGE_IS_PFNZERO | abi.PAGE_IS_HUGE


def scan_outline(pagemap: Pagemap, segments: Sequence[Segment], geometry: Geometry) -> Outline:
    """Return the outline of the PMD ranges of `segments`, which are whole and ascend.

    The scan changes nothing: it clears no soft-dirty bits, and sets up no write tracking, which others may be using.
    """
    regions = [runs for segment in segments for runs in pagemap.scan(segment, any_of=_ANY)]
    if not regions:
        return Outline.joined([])
    runs = np.concatenate(regions)
    kinds = np.zeros(len(runs), np.uint8)
    for category, kind in _KINDS:
        kinds[runs[:, 2] & np.uint64(category) != 0] |= kind
    return outline_of(runs[:, 0], runs[:, 1], kinds, geometry)
