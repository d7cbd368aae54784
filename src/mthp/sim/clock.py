"""Simulated time: the sum of what every operation of the machine would have cost.

Nothing is measured here. Every operation that takes time on a real machine is counted (:meth:`Clock.spend`), and
the table of :class:`Costs` has its cost. Sums are whole picoseconds, so that the same calls take the same time on any
machine. Waiting advances the clock without cost.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass

from mthp.errors import UsageError

_PS_PER_NS = 1000


@dataclass(frozen=True, slots=True)
class Costs:
    """Cost of each operation, in picoseconds.

    The defaults are those of a virtual machine of two cores on an x86-64 server (Linux 6.18, 4 KiB pages): rounded
    medians of three runs of ``bench/measure_costs.py``, which documents how each is measured; use its table for
    another machine's time. `scan_pte` is that of khugepaged at full throttle over 4 GiB (``bench/bench_idle_scan.py``:
    24 to 27 million entries a second). `collapse`, which cannot be separated from the clearing, `split_folio` and
    `split_page` are estimates.

    Attributes:
        fault: entering and leaving a page fault, and its page table entry.
        syscall: entering and leaving a system call.
        zero_byte, copy_byte: clearing and copying a byte.
        alloc_small, alloc_large: taking a folio of order 0, or of a larger one, from the free lists.
        free_folio: unmapping a folio that a program does not need any more, and freeing it.
        scan_pte: khugepaged's scan of one entry.
        scan_range: its scan of one PMD range, without the entries.
        collapse: the part of a collapse that does not depend on the order: locks, flushing the TLB, the new entry.
        collapse_pte: isolating, unmapping and freeing one page of it.
        reclaim_pte: ageing one entry.
        swap_out, swap_in: writing one page to the device, and reading it.
        compact_frame: compaction's scan of one frame.
        migrate_folio: unmapping, mapping and accounting a folio that moves, without its bytes.
        split_folio, split_page: splitting a folio, and each page of it.
    """

    # In picoseconds, because a byte takes less than a nanosecond; whole, so that sums do not depend on their order.
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
        costs: cost of each operation.

    Attributes:
        costs: cost of each operation.
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
        """Add the cost of an operation done `times` times; `cost` is the name of a field of :class:`Costs`."""
        if not times:
            return
        # int(): NumPy's integers would overflow silently at 2**63.
        ps = getattr(self.costs, cost) * int(times)
        self._spent[cost] += ps
        self._ps += ps

    def wait_ns(self, nanoseconds: int) -> None:
        """Advance the time without an operation.

        Raises:
            UsageError: the time is negative.
        """
        if nanoseconds < 0:
            raise UsageError(f"time does not go back by {-nanoseconds} ns")
        self._ps += nanoseconds * _PS_PER_NS

    def spent_ns(self) -> dict[str, int]:
        """Return the nanoseconds spent on each operation, by its name in :class:`Costs`, without those never done."""
        return {name: ps // _PS_PER_NS for name, ps in sorted(self._spent.items())}
