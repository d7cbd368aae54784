"""Give back pages of zeroes that lie in large folios of a process.

Since Linux 6.12 the kernel maps the shared zero page in place of a page of zeroes when it splits a folio to base pages
(try_to_map_unused_to_zeropage(), mm/migrate.c). It checks the bytes itself with the page unmapped, so no concurrent
write is lost. Only a split has to be caused. ``split_huge_pages`` of debugfs leaves large folios that are in use.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.closing import Closing
from mthp.linux.processspace import ProcessSpace
from mthp.linux.split.divide import LargeFolio, divider_of
from mthp.linux.split.file import opened, split_ability
from mthp.ptes import Block
from mthp.trimchecks import trim_each
from mthp.trimming import TrimBy, TrimOutcome, in_use

PAUSE = 0.002
"""Seconds before the second attempt at folios that were locked or referenced for a moment."""


class Trimmer(Closing):
    """A trimmer of folios of one process.

    Args:
        space: address space of the process; the caller keeps it open and closes it.

    Raises:
        NotPermittedError: frames cannot be seen.
    """

    def __init__(self, space: ProcessSpace) -> None:
        self._space, self._geometry = space, space.geometry
        self._ability = split_ability(self._geometry)
        # MADV_COLD needs no file, which may have been closed to this process meanwhile.
        self._dividers = {"cold": divider_of(space, None, self._ability)}

    def close(self) -> None:
        for divider in self._dividers.values():
            divider.close()

    def trim(self, folios: Sequence[Block], zero: Sequence[NDArray[np.bool_]], by: TrimBy) -> list[TrimOutcome]:
        """Trim folios as :meth:`mthp.trimming.Trimming.trim_folios` does.

        Raises:
            UnsupportedError, NotPermittedError: this way is not possible here.
        """
        self._ability.require_split() if by == "split" else self._ability.require_cold()
        if by not in self._dividers:
            self._dividers[by] = divider_of(self._space, opened(), self._ability)
        return trim_each(
            self._space,
            folios,
            zero,
            lambda folio, pfn, pages: self._one(folio, pfn, pages, by),
            lambda: time.sleep(PAUSE),
        )

    def _one(self, folio: Block, pfn: int, zero: NDArray[np.bool_], by: TrimBy) -> tuple[int, int]:
        """Trim one folio; return errno and duration in nanoseconds."""
        begin = time.perf_counter_ns()
        address, order = folio
        error = 0
        if by == "split":
            layout = in_use(zero, self._geometry.page_size)
            self._dividers[by].divide(LargeFolio(address, pfn, order), layout)
        else:
            # MADV_COLD of a part splits the folio (madvise_cold_or_pageout_pte_range(), mm/madvise.c), but makes its
            # page look old: a page of zeroes, since nothing uses it.
            error = self._dividers[by].cool(address + int(zero.argmax()) * self._geometry.page_size)
        return error, time.perf_counter_ns() - begin
