"""What the machine counts, under the kernel's names.

A name without a slash is one of ``/proc/vmstat`` or of khugepaged's directory (``pages_collapsed``, ``full_scans``);
``hugepages-64kB/collapse_alloc`` is a file of ``hugepages-<size>kB/stats/``. A counter that was never touched is 0
and not there.
"""

from __future__ import annotations

from collections import Counter

from mthp.geometry import Geometry


class Counters:
    """Counters by name. Those per size may go down: ``nr_anon`` is a level."""

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
        """All counters that were ever touched, by name."""
        return dict(self._values)

    def since(self, before: dict[str, int]) -> dict[str, int]:
        """What changed since `before`, a former answer of :meth:`values`: the differences that are not 0."""
        now = self._values
        return {name: value - before.get(name, 0) for name, value in now.items() if value != before.get(name, 0)}
