"""Gives back pages of zeroes that lie in large folios of a process.

The kernel maps the shared zero page in place of a page of zeroes when it splits a folio to base pages, since Linux 6.12
(try_to_map_unused_to_zeropage(), mm/migrate.c), and looks at the bytes itself with the page unmapped: what is written
meanwhile is not lost. So all that has to be caused is a split. MADV_COLD of a part of a folio does (mm/madvise.c,
madvise_cold_or_pageout_pte_range()); it makes the page that it names look old, hence a page of zeroes is named.
``split_huge_pages`` of debugfs leaves large what is in use.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.closing import Closing
from mthp.linux.space import ProcessSpace
from mthp.linux.split.divide import LargeFolio, divider_of
from mthp.linux.split.file import SplitAbility, SplitFile, opened, split_ability
from mthp.ptes import Block
from mthp.trimchecks import trim_each
from mthp.trimming import TrimBy, TrimOutcome, in_use

PAUSE = 0.002
"""Seconds before folios are tried a second time whose lock or reference may have passed."""


class Trimmer(Closing):
    """Trims folios of one process.

    Args:
        space: of the process; it stays the caller's.
        ability: what the kernel does; found out if None.
        file: to split by; the system's if None.

    Raises:
        NotPermittedError: frames cannot be seen.
    """

    def __init__(self, space: ProcessSpace, ability: SplitAbility | None = None, file: SplitFile | None = None) -> None:
        self._space, self._geometry = space, space.geometry
        self._ability = split_ability(self._geometry) if ability is None else ability
        self._file = file
        # MADV_COLD takes no file, which may have been closed to this process meanwhile.
        self._dividers = {"cold": divider_of(space, None, self._ability)}

    def close(self) -> None:
        for divider in self._dividers.values():
            divider.close()

    def trim(self, folios: Sequence[Block], zero: Sequence[NDArray[np.bool_]], by: TrimBy) -> list[TrimOutcome]:
        """Do what :meth:`mthp.trimming.Trimming.trim_folios` says.

        Raises:
            UnsupportedError, NotPermittedError: not in this way here.
        """
        self._ability.require_split() if by == "split" else self._ability.require_cold()
        if by not in self._dividers:
            file = opened() if self._file is None else self._file
            self._dividers[by] = divider_of(self._space, file, self._ability)
        return trim_each(
            self._space,
            folios,
            zero,
            lambda folio, pfn, pages: self._one(folio, pfn, pages, by),
            lambda: time.sleep(PAUSE),
        )

    def _one(self, folio: Block, pfn: int, zero: NDArray[np.bool_], by: TrimBy) -> tuple[int, int]:
        """Trim one folio: errno, and how long it took in nanoseconds."""
        begin = time.perf_counter_ns()
        address, order = folio
        error = 0
        if by == "split":
            layout = in_use(zero, self._geometry.page_size)
            self._dividers[by].divide(LargeFolio(address, pfn, order), layout)
        else:
            error = self._dividers[by].cool(address + int(zero.argmax()) * self._geometry.page_size)
        return error, time.perf_counter_ns() - begin
