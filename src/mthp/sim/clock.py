"""Simulated time: what everything that the machine does would have cost, summed up.

Nothing here measures anything. Whatever takes time on a real machine says how often it was done
(:meth:`Clock.spend`), and the table of :class:`Costs` says what once takes. Sums are whole picoseconds, so that the
same calls give the same time on any machine. Who waits moves the clock on without anything being spent.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from mthp.errors import UsageError

_PS_PER_NS = 1000


@dataclass(frozen=True, slots=True)
class Costs:
    """What things take, in picoseconds each.

    The defaults are those of a virtual machine of two cores on an x86-64 server (Linux 6.18, 4 KiB pages), rounded
    medians of three runs of ``bench/measure_costs.py``, which says how each is measured; give its table where another
    machine's time matters. `scan_pte` is that of khugepaged at full throttle over 4 GiB (``bench/bench_idle_scan.py``:
    24 to 27 million entries a second). Estimated are `collapse`, which cannot be told from the clearing beside it, and
    `split_folio` and `split_page`.

    Attributes:
        fault: entering and leaving a page fault, and its entry in the page table.
        syscall: entering and leaving a system call.
        zero_byte, copy_byte: clearing and copying memory.
        alloc_small, alloc_large: taking a folio of order 0, or of a larger one, from the free lists.
        free_folio: unmapping one where a program has no use for it any more, and giving it back.
        scan_pte: khugepaged's look at one entry.
        scan_range: its look at one PMD range as a whole.
        collapse: all of one collapse that does not depend on the order: locks, flushing the TLB, the new entry.
        collapse_pte: isolating, unmapping and freeing one page of it.
        reclaim_pte: ageing one entry.
        swap_out, swap_in: one page to the device, and back.
        compact_frame: the look of compaction at one frame.
        migrate_folio: unmapping, mapping and noting a folio that moves; its bytes are extra.
        split_folio, split_page: splitting a folio, and each page of it.
    """

    fault: int = 900_000
    syscall: int = 200_000
    zero_byte: int = 85
    copy_byte: int = 63
    alloc_small: int = 380_000
    alloc_large: int = 1_250_000
    free_folio: int = 210_000
    scan_pte: int = 41_000
    scan_range: int = 190_000
    collapse: int = 9_000_000
    collapse_pte: int = 760_000
    reclaim_pte: int = 55_000
    swap_out: int = 2_450_000
    swap_in: int = 1_760_000
    compact_frame: int = 9_000
    migrate_folio: int = 1_500_000
    split_folio: int = 4_000_000
    split_page: int = 60_000

    def __post_init__(self) -> None:
        for cost in dataclasses.fields(self):
            value = getattr(self, cost.name)
            if not isinstance(value, int) or value < 0:
                raise UsageError(f"cost {cost.name} {value!r} is not a whole number of picoseconds")


class Clock:
    """The time of a machine, from 0.

    Args:
        costs: what things take.

    Attributes:
        costs: the table.
    """

    def __init__(self, costs: Costs | None = None) -> None:
        self.costs = costs or Costs()
        self._ps = 0
        self._spent: Counter[str] = Counter()

    @property
    def now_ns(self) -> int:
        """Nanoseconds since the machine started."""
        return self._ps // _PS_PER_NS

    def spend(self, cost: str, times: int = 1) -> None:
        """Something was done `times` times; `cost` is the name of a field of :class:`Costs`."""
        if not times:
            return
        ps = getattr(self.costs, cost) * int(times)
        self._spent[cost] += ps
        self._ps += ps

    def wait_ns(self, nanoseconds: int) -> None:
        """Time goes by in which nothing is done.

        Raises:
            UsageError: it would go backwards.
        """
        if nanoseconds < 0:
            raise UsageError(f"time does not go back by {-nanoseconds} ns")
        self._ps += nanoseconds * _PS_PER_NS

    def spent_ns(self) -> dict[str, int]:
        """Nanoseconds that went into each kind of work, by its name in :class:`Costs`; without what was never done."""
        return {name: ps // _PS_PER_NS for name, ps in sorted(self._spent.items())}
