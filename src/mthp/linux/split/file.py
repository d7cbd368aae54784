"""Split folios in place with ``split_huge_pages`` of debugfs, and find the parts of it that this kernel supports.

``PID,0xSTART,0xEND,ORDER`` written to it splits every folio between the addresses to folios of ORDER
(split_huge_pages_pid(), mm/huge_memory.c); a fifth word is the page around which a folio is split while its other
halves stay large. A write does not report its effect. So trials on memory of this process find each ability, once a
run; releases are never compared.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import functools
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mthp.closing import Closing
from mthp.errors import MthpError, NotPermittedError, UnsupportedError
from mthp.geometry import MIN_ANON_ORDER, Geometry
from mthp.linux import abi
from mthp.linux.kpageflags import FolioReader
from mthp.linux.pagemap import Pagemap
from mthp.linux.process import Process

SPLIT_FILE = Path("/sys/kernel/debug/split_huge_pages")

LARGEST_TRIAL = 64 << 20
"""Size of the largest folio made for a trial, in bytes; arm64 with 64 KiB pages has a PMD size of 512 MiB."""


TRIALS = 3
"""Attempts of each trial, because a scan of memory, or a fork in another thread, briefly references folios."""


class SplitFile(Closing):
    """The file, open for writing; OSError is raised if it cannot be opened."""

    def __init__(self, path: Path = SPLIT_FILE) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)

    def split(self, pid: int, address: int, page_size: int, order: int, at: int | None = None) -> int:
        """Split the folio of the page at `address` to `order`; success does not prove that it was split.

        Args:
            pid: PID of the process that maps it, in the PID namespace of this process.
            at: the page of the folio around which alone it is split, where the kernel can; None for equal parts.

        Returns:
            0, or errno: ESRCH for a process that is gone.
        """
        where = "" if at is None else f",{at}"
        try:
            os.write(self._fd, f"{pid},{address:#x},{address + page_size:#x},{order}{where}".encode())
        except OSError as error:
            return error.errno or errno.EIO
        return 0

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def opened(path: Path = SPLIT_FILE) -> SplitFile:
    """Return the system's file, open.

    Raises:
        NotPermittedError: it cannot be opened any more.
    """
    try:
        return SplitFile(path)
    except OSError as error:
        reason, remedy = why_closed(error.errno or 0, mounted=_is_mounted(path))
        raise NotPermittedError(f"folios cannot be split in place: {reason}", help=remedy) from error


@dataclass(frozen=True, slots=True)
class SplitAbility:
    """Results of the trials; None for a trial that could not be made.

    Attributes:
        file: errno of opening `split_huge_pages`, 0 if it is open to this process.
        mounted: whether debugfs is mounted where the file is expected.
        untried: why nothing could be tried on memory of this process; ``""`` if it could.
        orders: whether a split makes folios of an order above 0.
        offset: whether one write keeps the halves without the given page large.
        zeroes: whether pages of zeroes return to the kernel in a split to base pages.
        cold: whether MADV_COLD of one page splits its folio to base pages, and returns pages of zeroes.
    """

    file: int
    mounted: bool = True
    untried: str = ""
    orders: bool | None = None
    offset: bool | None = None
    zeroes: bool | None = None
    cold: bool | None = None

    @property
    def splits(self) -> bool:
        """Return whether any layout can be made of a PMD folio, and the fill outside of it is given back."""
        return bool(self.orders and self.zeroes)

    def require_split(self) -> None:
        """Raise NotPermittedError or UnsupportedError, with the reason and the remedy, unless :attr:`splits`."""
        if self.splits:
            return
        reason, remedy = self.why_no_split()
        kind = NotPermittedError if self.file in (errno.EPERM, errno.EACCES) else UnsupportedError
        raise kind(f"folios cannot be split in place here: {reason}", help=remedy)

    def require_cold(self) -> None:
        """Raise UnsupportedError, with the reason and the remedy, unless :attr:`cold`."""
        if not self.cold:
            reason = self.untried or "MADV_COLD does not split large folios and take back zeroes"
            raise UnsupportedError(f"large folios cannot be trimmed here: {reason}", help="Linux 6.12 or later")

    def why_no_split(self) -> tuple[str, str]:
        """Return why folios cannot be split to any order here, and the remedy; ``""`` if they can."""
        if self.splits:
            return "", ""
        if self.file:
            return why_closed(self.file, mounted=self.mounted)
        if self.orders is None:
            return self.untried or "it could not be tried", ""
        if not self.orders:
            return "the kernel splits to base pages only", "Linux 6.12 or later"
        return "the kernel does not take back the zeroes that a collapse fills holes with", "Linux 6.12 or later"


def why_closed(error: int, *, mounted: bool) -> tuple[str, str]:
    """Return why `SPLIT_FILE` cannot be opened, and the remedy."""
    if error == errno.ENOENT and not mounted:
        return "debugfs is not mounted", "mount -t debugfs debugfs /sys/kernel/debug (as root)"
    if error == errno.ENOENT:
        return f"{SPLIT_FILE} does not exist", "a kernel with CONFIG_DEBUG_FS and CONFIG_TRANSPARENT_HUGEPAGE"
    if error == errno.EACCES or (error == errno.EPERM and os.geteuid() != 0):
        return f"{SPLIT_FILE} is not open to this user", "run as root"
    if error == errno.EPERM:
        # security_locked_down(LOCKDOWN_DEBUGFS) in debugfs_locked_down() (fs/debugfs/file.c).
        return "kernel lockdown closes debugfs", "boot with lockdown=none, which needs Secure Boot to be off"
    return f"{SPLIT_FILE}: {os.strerror(error)}", ""


@functools.cache
def split_ability(geometry: Geometry) -> SplitAbility:
    """Return the abilities of this kernel for these rights; at the first call it takes some milliseconds to find them.

    They are found on memory of this process, which is released, and by frame numbers, which alone show a split.
    """
    error, file = 0, None
    try:
        file = SplitFile()
    except OSError as refused:
        error = refused.errno or errno.EIO
    ability = SplitAbility(error, mounted=error != errno.ENOENT or _is_mounted())
    try:
        return _tried(file, ability, geometry)
    except _UntriedError as why:
        return dataclasses.replace(ability, untried=str(why))
    finally:
        if file is not None:
            file.close()


def _is_mounted(path: Path = SPLIT_FILE) -> bool:
    """Return whether debugfs has any entry at its usual place."""
    try:
        return any(path.parent.iterdir())
    except OSError:
        return False


class _UntriedError(Exception):
    """A trial could not be made; the text has the reason."""


def _tried(file: SplitFile | None, ability: SplitAbility, geometry: Geometry) -> SplitAbility:
    if geometry.pmd_size > LARGEST_TRIAL:
        raise _UntriedError(f"not tried, since a folio has {geometry.label(geometry.pmd_order)}")
    with _trial(geometry) as trial:
        orders = offset = zeroes = None
        small, top, half = MIN_ANON_ORDER, geometry.pmd_order, geometry.ptes_per_pmd // 2
        if file is not None:
            # Before Linux 6.9 the order is ignored, and the result is base pages.
            orders = trial.shows(lambda: trial.split(file, small), lambda: trial.orders(0, 4) == (small, small))
            # One page of contents, so that all other pages are fill, which kernels before 6.12 keep.
            zeroes = trial.shows(lambda: trial.split(file, 0), trial.given_back)
            parts = top - 1, small
            # Split around the first page of the second half, the first half stays one folio.
            offset = trial.shows(lambda: trial.split(file, small, half), lambda: trial.orders(0, half) == parts)
        # Tried without the file, too: `trim` needs nothing else.
        cold = trial.shows(trial.cool, trial.given_back)
    return SplitAbility(ability.file, ability.mounted, "", orders, offset, zeroes, cold)


class _Trial:
    """One PMD range of this process, of which only the first page was written.

    Args:
        forget: function that empties it.
    """

    def __init__(
        self, geometry: Geometry, start: int, pagemap: Pagemap, folios: FolioReader, forget: Callable[[], None]
    ) -> None:
        self.start = start
        self._geometry, self._pagemap, self._folios, self._forget = geometry, pagemap, folios, forget

    def collapse(self) -> None:
        """Make one new PMD folio of it, with one page of contents; raise _UntriedError if the kernel refuses."""
        self._forget()
        ctypes.memset(self.start, 1, 1)
        error = abi.madvise(self.start, self._geometry.pmd_size, abi.MADV_COLLAPSE)
        if error:
            raise _UntriedError(f"not tried, since MADV_COLLAPSE of memory of this process fails: {os.strerror(error)}")

    def shows(self, act: Callable[[], object], wanted: Callable[[], bool]) -> bool:
        """Return whether a new folio is `wanted` after `act`; failures from passing references are tried again."""
        for _ in range(TRIALS):
            self.collapse()
            act()
            if wanted():
                return True
        return False

    def split(self, file: SplitFile, order: int, at: int | None = None) -> None:
        file.split(os.getpid(), self.start, self._geometry.page_size, order, at)

    def cool(self) -> None:
        """Advise MADV_COLD of a page that was not written."""
        # The range must be a part of the folio: advice for all of it only ages its pages.
        last = self.start + self._geometry.pmd_size - self._geometry.page_size
        abi.madvise(last, self._geometry.page_size, abi.MADV_COLD)

    def orders(self, *pages: int) -> tuple[int, ...]:
        return tuple(self._folios.folio_of(self._pfn(page))[1] for page in pages)

    def given_back(self) -> bool:
        """Return whether the written page is a base page, and the others are not mapped or the zero page."""
        others = (self._pfn(page) for page in (1, self._geometry.ptes_per_pmd - 1))
        if self._folios.folio_of(self._pfn(0))[1]:
            return False
        # Since 6.12 the kernel maps the zero page in place of zeroes; pages that were never mapped count as well.
        return all(not pfn or self._folios.word(pfn) & abi.KPF_ZERO_PAGE for pfn in others)

    def _pfn(self, page: int) -> int:
        return self._pagemap.word(self.start + page * self._geometry.page_size) & abi.PM_PFRAME_MASK


@contextmanager
def _trial(geometry: Geometry) -> Iterator[_Trial]:
    """Map memory for the trials; raise _UntriedError if there is none, or if frames cannot be seen."""
    try:
        folios = FolioReader(geometry.pmd_order)
    except OSError as error:
        raise _UntriedError(f"not tried, since frames cannot be seen: {error.strerror} (run as root)") from error
    try:
        # Twice the size has one aligned PMD range in it.
        with Process("self") as process, mmap.mmap(-1, 2 * geometry.pmd_size, mmap.MAP_PRIVATE) as memory:
            view = ctypes.c_char.from_buffer(memory)
            start = -(-ctypes.addressof(view) // geometry.pmd_size) * geometry.pmd_size
            # The mapping cannot be released while the view exists.
            del view
            with Pagemap(process) as pagemap:
                yield _Trial(geometry, start, pagemap, folios, lambda: memory.madvise(mmap.MADV_DONTNEED))
    except OSError as error:
        raise _UntriedError(f"not tried: {error.strerror}") from error
    except MthpError as error:
        raise _UntriedError(f"not tried: {error.message}") from error
    finally:
        folios.close()
