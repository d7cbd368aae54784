"""The machine's counters, under the kernel's names.

A name without a slash is in ``/proc/vmstat`` or in khugepaged's directory (``pages_collapsed``, ``full_scans``);
``hugepages-64kB/collapse_alloc`` is a file of ``hugepages-<size>kB/stats/``. A counter that was never changed is 0, and
has no entry.
"""

from __future__ import annotations

from collections import Counter

from mthp.geometry import Geometry


class Counters:
    """Counters by name. Levels such as ``nr_anon`` may go down."""

    def __init__(self, geometry: Geometry) -> None:
        self._values: Counter[str] = Counter()
        self._sizes = [geometry.sysfs_name(order) for order in range(geometry.pmd_order + 1)]

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def count(self, name: str, by: int = 1) -> None:
        """Add `by` to a counter of the whole machine (count_vm_events)."""
        if by:
            self._values[name] += by

    def count_mthp(self, order: int, name: str, by: int = 1) -> None:
        """Add `by` to a counter of one folio size (count_mthp_stat, mod_mthp_stat)."""
        if by:
            self._values[f"{self._sizes[order]}/{name}"] += by

    def values(self) -> dict[str, int]:
        """Return all counters that were ever changed, by name."""
        return dict(self._values)

    def since(self, before: dict[str, int]) -> dict[str, int]:
        """Return the differences that are not 0 from `before`, an earlier result of :meth:`values`."""
        now = self._values
        return {name: value - before.get(name, 0) for name, value in now.items() if value != before.get(name, 0)}
