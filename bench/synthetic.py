"""Synthetic memory for benchmarks, in the form of a recording."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.geometry import X86_64
from mthp.ptes import ORDER_NONE, Pte, PteColumns, Segment
from mthp.snapshot.description import Description
from mthp.snapshot.recorded import RecordedSpace
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma

BASE = 0x7F00_0000_0000
PAGE = X86_64.page_size


class Synthetic(RecordedSpace):
    """One mapping of anonymous memory.

    Args:
        there: bool, shape (pages,): which pages are mapped.
        huge: bool, shape (PMD ranges,): which ranges one PMD entry also maps; none by default.
        label: its name.
    """

    def __init__(self, there: NDArray[np.bool_], huge: NDArray[np.bool_] | None = None, *, label: str) -> None:
        self._state = np.where(there, np.uint16(Pte.PRESENT), np.uint16(0))
        self._order = np.where(there, np.int8(0), np.int8(ORDER_NONE))
        if huge is not None:
            n = X86_64.ptes_per_pmd
            self._state.reshape(-1, n)[huge] = Pte.PRESENT | Pte.PMD_MAPPED
            self._order.reshape(-1, n)[huge] = X86_64.pmd_order
        vma = Vma(BASE, BASE + len(there) * PAGE, "rw-p", has_anon_vma=True)
        switches, tunables = Switches.defaults(X86_64), Tunables.defaults(X86_64)
        label = f"{label} (synthetic)"
        super().__init__(
            Description(label, "6.18.0", "2026-01-01T00:00:00Z", X86_64, switches, tunables, False, (), (vma,), 0),
            label,
            "snapshot",
        )

    def read(self, segments: Sequence[Segment]) -> PteColumns:
        """As made up."""
        parts = [slice((start - BASE) // PAGE, (end - BASE) // PAGE) for start, end in segments]
        state = np.concatenate([self._state[part] for part in parts])
        return PteColumns(tuple(segments), state, np.concatenate([self._order[part] for part in parts]))
