"""Settings of the machine other than khugepaged's tunables and the switches of the sizes."""

from __future__ import annotations

from dataclasses import dataclass

DEFRAG_WORDS = ("always", "defer", "defer+madvise", "madvise", "never")
"""Words of the ``defrag`` file next to ``enabled``."""


@dataclass(frozen=True, slots=True)
class Knobs:
    """Files of transparent_hugepage and ``/proc/sys/vm``, with their defaults.

    Attributes:
        defrag: faults that compact and reclaim memory to get a large folio; khugepaged has its own setting.
        use_zero_page: whether a read of a none entry maps the huge zero page.
        shrink_underused: whether huge folios that are mostly zero are split when memory is short.
        zone_reclaim_mode: whether a node reclaims before the next one is tried; khugepaged then skips ranges with pages
            on nodes far apart.
    """

    defrag: str = "madvise"
    use_zero_page: bool = True
    shrink_underused: bool = True
    zone_reclaim_mode: int = 0

    def fault_may_wait(self, *, advised: bool) -> bool:
        """Return whether a fault may compact and reclaim for a large folio (vma_thp_gfp_mask, mm/huge_memory.c)."""
        # `defer` wakes kswapd and kcompactd, and waits for neither.
        return self.defrag == "always" or (advised and self.defrag in ("madvise", "defer+madvise"))
