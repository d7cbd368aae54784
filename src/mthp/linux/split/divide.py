"""Divide one large folio in place into the folios of a layout, and check every step.

A write to `split_huge_pages` returns success whether it split or not. So after each write pagemap and kpageflags must
show the parts before a smaller order is written for one of them.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.closing import Closing
from mthp.errors import NotPermittedError
from mthp.geometry import Geometry
from mthp.linux import abi
from mthp.linux.kpageflags import KPAGEFLAGS, FolioReader
from mthp.linux.pagemap import Pagemap
from mthp.linux.process import Process
from mthp.linux.processspace import ProcessSpace
from mthp.linux.split.file import SplitAbility, SplitFile
from mthp.linux.split.writes import Part, SplitWrite, SplitWrites

PAUSES = (0.0, 0.0, 0.001, 0.005)
"""Seconds before each attempt to split. A shared folio takes two writes on Linux 6.18, a lock is released within
microseconds, and a pin of direct I/O within milliseconds."""

BACK_OFF = (0.0, 0.01, 0.1)
"""Seconds before each attempt to bring a folio that could not be divided to base pages."""


@dataclass(frozen=True, slots=True)
class LargeFolio:
    """A folio that is mapped as a whole, its pages one after another.

    Attributes:
        address: address of its first page.
        pfn: its first frame.
    """

    address: int
    pfn: int
    order: int


class FolioDivider(Closing):
    """A divider of folios of one process.

    Args:
        process: owner of the folios; the caller keeps it open and closes it.
        file: the file to split by; None if there is only MADV_COLD.
        offset: whether the kernel can split around a page, see :class:`~mthp.linux.split.file.SplitAbility`.
        sleep: lets some seconds pass between two tries.

    Attributes:
        calls_ns: duration of each write, and of each advice, in nanoseconds.

    The readers and the file are closed with this object. Methods raise TargetVanishedError if the process is gone.
    """

    def __init__(
        self,
        process: Process,
        geometry: Geometry,
        pagemap: Pagemap,
        folios: FolioReader,
        file: SplitFile | None,
        *,
        offset: bool = False,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._sleep = sleep
        self._process, self._geometry, self._pagemap, self._folios = process, geometry, pagemap, folios
        self._file, self._offset = file, offset
        self.calls_ns: list[int] = []

    def close(self) -> None:
        self._pagemap.close()
        self._folios.close()
        if self._file is not None:
            self._file.close()

    def folio_at(self, address: int, order: int) -> LargeFolio | None:
        """Return the folio of `order` with its first page mapped at `address`; None if there is no such folio."""
        word = self._pagemap.word(address)
        pfn = word & abi.PM_PFRAME_MASK
        # A naturally aligned folio with a tail at the start of the second half has both halves.
        if not word & abi.PM_PRESENT or pfn % (1 << order) or not self._is_tail(pfn + (1 << order - 1)):
            return None
        folio = LargeFolio(address, pfn, order)
        return folio if self._is_apart(folio, Part(0, order)) else None

    def divide(self, folio: LargeFolio, layout: NDArray[np.int8]) -> list[Part]:
        """Split `folio` until no page lies in a larger folio than in `layout`; return the parts that cannot be split.

        Args:
            layout: int8, shape (pages,): the order of the folio that each page is to lie in.
        """
        steps = SplitWrites(layout, offset=self._offset)
        todo, refused = [Part(0, folio.order)], []
        while todo:
            part = todo.pop()
            step = steps.next(part)
            if step is None:
                continue
            # If this did not split, a write for a smaller order would split the whole larger folio to it.
            if self._split(folio, part, step):
                todo += step.left
            else:
                refused.append(part)
        return refused

    def _split(self, folio: LargeFolio, part: Part, step: SplitWrite) -> bool:
        """Carry out a step on `part` of `folio`; return whether it succeeded, or the part is not mapped any more."""
        for pause in PAUSES:
            self._sleep(pause)
            page = self._mapped(folio, part)
            if page is None:
                # The target unmapped it meanwhile, or it was swapped out, or copied to another folio.
                return True
            # Success means only that the call was understood: a pinned or locked folio is skipped
            # (split_huge_pages_pid(), mm/huge_memory.c), and the first write for one that is shared after a fork splits
            # only its PMD entries on 6.18.
            if not self._write(page, step.apart.order, step.at):
                return False
            if self._is_apart(folio, step.apart):
                return True
        return False

    def to_base_pages(self, folio: LargeFolio, part: Part, holes: NDArray[np.bool_]) -> bool:
        """Bring `part` of `folio` to base pages by any means; return whether it lies in no larger folio any more.

        Args:
            holes: pages of `folio` that may lose their age: bool, shape (pages,).
        """
        for pause in BACK_OFF:
            self._sleep(pause)
            page = self._mapped(folio, part)
            if page is None:
                return True
            self._write(page, 0)
            if self._is_apart(folio, Part(part.offset, 0)):
                return True
            # Without the file, or where it did not split. MADV_COLD makes its page look old, so it gets a hole.
            hole = self._mapped(folio, part, holes)
            if hole is not None:
                self.cool(hole)
                if self._is_apart(folio, Part(part.offset, 0)):
                    return True
        return False

    def holds(self, address: int, wanted: NDArray[np.bool_]) -> bool:
        """Return whether one of the `wanted` pages from `address` on is mapped, and not to the shared zero page.

        A page that compaction is moving has a migration entry, which pagemap shows as swapped: it counts as mapped.
        """
        words = self._pagemap.read([(address, address + len(wanted) * self._geometry.page_size)])
        if (wanted & ((words & np.uint64(abi.PM_SWAP)) != 0)).any():
            return True
        there = wanted & ((words & np.uint64(abi.PM_PRESENT)) != 0)
        frames = np.unique(words[there] & np.uint64(abi.PM_PFRAME_MASK)).tolist()
        # There is only one zero page.
        return len(frames) > 1 or any(not self._folios.word(frame) & abi.KPF_ZERO_PAGE for frame in frames)

    def cool(self, address: int) -> int:
        """Advise MADV_COLD of one page, which splits its large folio to base pages (madvise_cold(), mm/madvise.c).

        Returns:
            0, which does not prove a split, or errno.
        """
        begin = time.perf_counter_ns()
        error = self._process.advise(address, self._geometry.page_size, abi.MADV_COLD)
        self.calls_ns.append(time.perf_counter_ns() - begin)
        return error

    def _write(self, address: int, order: int, at: int | None = None) -> bool:
        """Write to the file; return whether the kernel accepted it."""
        # The file takes a PID, which must not be that of another process by now.
        self._process.check_alive()
        if self._file is None:
            return False
        begin = time.perf_counter_ns()
        # One page of the folio is enough, and quicker: the kernel walks every page between the addresses.
        error = self._file.split(self._process.pid, address, self._geometry.page_size, order, at)
        self.calls_ns.append(time.perf_counter_ns() - begin)
        if error == errno.ESRCH:
            self._process.check_memory()
        return not error

    def _mapped(self, folio: LargeFolio, part: Part, wanted: NDArray[np.bool_] | None = None) -> int | None:
        """Return the address of a page of `part`, one of the `wanted`, with its old mapping; None without one."""
        size = self._geometry.page_size
        begin = folio.address + part.offset * size
        first, count = folio.pfn + part.offset, 1 << part.order
        if wanted is None:
            word = self._pagemap.word(begin)
            if word & abi.PM_PRESENT and word & abi.PM_PFRAME_MASK == first:
                return begin
        words = self._pagemap.read([(begin, begin + count * size)])
        there = (words & np.uint64(abi.PM_PRESENT)) != 0
        there &= (words & np.uint64(abi.PM_PFRAME_MASK)) == np.arange(first, first + count, dtype=np.uint64)
        if wanted is not None:
            there &= wanted[part.pages]
        return begin + int(there.argmax()) * size if there.any() else None

    def _is_apart(self, folio: LargeFolio, part: Part) -> bool:
        """Return whether no folio reaches over the ends of `part`. Folios are naturally aligned."""
        begin = folio.pfn + part.offset
        return not self._is_tail(begin) and not self._is_tail(begin + (1 << part.order))

    def _is_tail(self, pfn: int) -> bool:
        return bool(self._folios.word(pfn) & abi.KPF_COMPOUND_TAIL)


def divider_of(space: ProcessSpace, file: SplitFile | None, ability: SplitAbility) -> FolioDivider:
    """Return a divider for folios of `space` by `file`, which is closed with it.

    Raises:
        NotPermittedError: frames cannot be seen with these rights.
        TargetVanishedError: the process is gone.
    """
    try:
        folios = FolioReader(space.geometry.pmd_order)
    except OSError as error:
        if file is not None:
            file.close()
        raise NotPermittedError(f"{KPAGEFLAGS}: {error.strerror}", help="run as root") from error
    offset = bool(ability.offset)
    return FolioDivider(space.process, space.geometry, Pagemap(space.process), folios, file, offset=offset)
