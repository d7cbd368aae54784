"""Drive the kernel's own khugepaged: on Linux 7.2 and later it collapses to orders below PMD order, too.

Its targets cannot be chosen, only the wanted sizes, whether holes are filled, and its speed. So for a *window* of
seconds the planned sizes are on and all others off, its budget is unlimited, and its rest is short. All of that is
recorded first and put back afterwards (:mod:`mthp.linux.journal`).

Compared with the mover, the target is not stopped, nothing is injected into it, and the kernel moves the pages: it
is the better way for a process that may not be stopped or traced, or that the mover refuses. It is the worse one
wherever the rest of the system counts: the switches apply to all processes, and khugepaged works for all that it
knows. It does not explain why it left a range unchanged.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.errors import UnsupportedError
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.processspace import ProcessSpace
from mthp.ptes import Block
from mthp.results import BlockOutcome, ScanResult

WINDOW_SECONDS = 5.0
"""Longest window in seconds."""

FULL_SCANS = 2
"""Full scans after which khugepaged has scanned all known memory at least once under the window's settings."""

POLL_SECONDS = 0.02

NOT_KNOWN = (
    "khugepaged collapsed nothing: it may not know this process, as it knows those that mapped or advised memory while"
    " a size was on"
)
LEFT = "khugepaged left it as it is"
NOT_IN_TIME = f"khugepaged did not scan it within {WINDOW_SECONDS:g} s"

_REST = "10"
_UNBOUNDED = "1000000000"


class KernelKhugepaged:
    """The machine's khugepaged, driven for one process.

    Args:
        journal: of the switches; the system's if not given.
        seconds: the longest window.
    """

    def __init__(
        self, space: ProcessSpace, journal: SwitchJournal | None = None, seconds: float = WINDOW_SECONDS
    ) -> None:
        self._seconds = seconds
        self._space = space
        self._geometry = space.geometry
        self._sysfs = space.sysfs
        self._journal = journal or SwitchJournal(sysfs=space.sysfs)

    def collapse(self, blocks: Sequence[Block], *, fill: bool) -> list[BlockOutcome]:
        """Run khugepaged for a window; return the outcome of each of `blocks`.

        Args:
            fill: whether runs with holes may be filled.

        Raises:
            UnsupportedError: this kernel's khugepaged does not collapse to orders below PMD order.
            NotPermittedError: these rights cannot set switches.
            MthpError: another process did not finish its window in time.
        """
        begin = time.perf_counter_ns()
        orders = sorted({order for _, order in blocks})
        settings = self._settings(orders, blocks, fill=fill)
        before = self._counted()
        made = self._made(blocks)
        with self._journal.settings(settings):
            end, scans = time.monotonic() + self._seconds, self._full_scans()
            counted = before
            while not made.all() and time.monotonic() < end:
                # The scan in which the window began counts, too, although it has passed a part of the memory before.
                over = self._full_scans() - scans > FULL_SCANS
                # Reading page tables is what costs here: only after khugepaged has made something.
                if over or self._counted() != counted:
                    counted = self._counted()
                    made = self._made(blocks)
                if over:
                    break
                time.sleep(POLL_SECONDS)
            else:
                over = False
        made = self._made(blocks)
        elapsed = (time.perf_counter_ns() - begin) // max(1, len(blocks))
        # khugepaged knows an address space from the time at which it mapped or advised memory while a size was on
        # (khugepaged_enter_vma(), mm/khugepaged.c).
        why = NOT_IN_TIME if not over else LEFT if self._counted() != before else NOT_KNOWN
        ends = [(ScanResult.SUCCEED, "") if one else (ScanResult.FAIL, why) for one in made.tolist()]
        return [BlockOutcome(*block, *end, elapsed_ns=elapsed) for block, end in zip(blocks, ends, strict=True)]

    def makes(self, order: int) -> bool:
        """Return whether khugepaged makes folios of `order`, and its settings may be changed with these rights."""
        return self._counts(order) and os.access(self._sysfs.root / "khugepaged/scan_sleep_millisecs", os.W_OK)

    def _counts(self, order: int) -> bool:
        """Return whether khugepaged counts folios of `order`, as it does for every size that it makes."""
        return "collapse_alloc" in self._sysfs.stats(self._geometry).get(order, {})

    def _settings(self, orders: Sequence[int], blocks: Sequence[Block], *, fill: bool) -> dict[str, str]:
        """Return khugepaged's settings for a window; the switches that turn sizes off come last."""
        if not self._counts(min(orders)):
            label = self._geometry.label(min(orders))
            raise UnsupportedError(
                f"this kernel's khugepaged makes no folios of {label}",
                help="use Linux 7.2 or later, or the mechanism move",
            )
        settings = {
            # Below the PMD order khugepaged knows only these two: any run with contents, or only full ones
            # (collapse_max_ptes_none(), mm/khugepaged.c, 7.2).
            "khugepaged/max_ptes_none": str(self._geometry.ptes_per_pmd - 1 if fill else 0),
            "khugepaged/pages_to_scan": _UNBOUNDED,
        }
        word = "madvise" if self._all_advised(blocks) else "always"
        directories = self._sysfs.size_directories(self._geometry.page_size)
        switches = {order: f"{path.name}/enabled" for order, path in directories.items() if (path / "enabled").exists()}
        settings |= {switches[order]: word for order in orders}
        settings |= {switch: "never" for order, switch in switches.items() if order not in orders}
        # Last, because writing it wakes khugepaged.
        return settings | {"khugepaged/scan_sleep_millisecs": _REST}

    def _all_advised(self, blocks: Sequence[Block]) -> bool:
        """Return whether all blocks lie in memory with MADV_HUGEPAGE: then a size need not be on for other memory."""
        advised = [(vma.start, vma.end) for vma in self._space.vmas() if "hg" in vma.flags]
        starts = np.array([start for start, _ in advised], np.int64)
        ends = np.array([end for _, end in advised], np.int64)
        addresses = np.array([address for address, _ in blocks], np.int64)
        at = np.searchsorted(starts, addresses, side="right") - 1
        return bool((at >= 0).all() and (addresses < ends[at]).all()) if advised else False

    def _made(self, blocks: Sequence[Block]) -> NDArray[np.bool_]:
        """Return which blocks lie in folios of their order or larger: bool, shape (blocks,)."""
        size = self._geometry.size_of
        columns = self._space.read([(address, address + size(order)) for address, order in blocks])
        counts = np.array([1 << order for _, order in blocks], np.int64)
        wanted = np.repeat(np.array([order for _, order in blocks], np.int8), counts)
        made: NDArray[np.bool_] = np.logical_and.reduceat(
            columns.folio_order >= wanted, np.cumsum(counts) - counts, dtype=np.bool_
        )
        return made

    def _full_scans(self) -> int:
        return int(self._sysfs.text("khugepaged/full_scans") or 0)

    def _counted(self) -> int:
        """Return the number of folios that khugepaged has allocated since boot, of all sizes."""
        stats = self._sysfs.stats(self._geometry)
        return sum(counters.get("collapse_alloc", 0) for counters in stats.values())
