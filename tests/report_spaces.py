"""Address spaces to report on: mixed, hostile, empty, huge."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fakes import FakeSpace
from mthp.ptes import ORDER_NONE, Pte, PteColumns, Segment
from mthp.vma import Vma, VmaKind

Mapping = tuple[Vma, NDArray[np.uint16], NDArray[np.int8]]

HOSTILE = (
    "<script>window.pwned=1</script>",
    '"><img src=x onerror="window.pwned=2">',
    "</title></style><script>window.pwned=3</script>",
    "{{ 7 * 7 }} {% raw %}",
    "javascript:window.pwned=4",
    "\u202eevil\u0000\x1b[31m",
    "not-utf8-\udcff",
)
"""Hostile names."""


def mixed(start: int, ranges: int, density: float, name: str = "", *, seed: int = 1) -> Mapping:
    """Return an anonymous mapping with PMD ranges of different fullness, and folios of several orders."""
    rng = np.random.default_rng(seed)
    pages = ranges * 512
    state, order = np.zeros(pages, np.uint16), np.full(pages, ORDER_NONE, np.int8)
    for first in range(0, pages, 512):
        part = slice(first, first + 512)
        folio = int(rng.choice([0, 0, 0, 2, 4, 9]))
        if folio == 9:
            state[part], order[part] = Pte.PRESENT | Pte.PMD_MAPPED, 9
            continue
        there = np.repeat(rng.random(512 >> folio) < rng.beta(3 * density, 3 * (1 - density)), 1 << folio)
        state[part] = np.where(there, int(Pte.PRESENT), np.where(rng.random(512) < 0.02, int(Pte.SWAP), 0))
        order[part] = np.where(there, folio, ORDER_NONE)
    vma = Vma(start, start + pages * 4096, "rw-p", name, VmaKind.ANON, frozenset({"hg"}), True)
    return vma, state, order


def redis_like() -> FakeSpace:
    """Return a store of some hundred megabytes and a sparse arena."""
    return FakeSpace(
        [
            mixed(0x5555_5540_0000, 6, 0.7, "[heap]"),
            mixed(0x7F00_0000_0000, 320, 0.8, seed=2),
            mixed(0x7F80_0000_0000, 130, 0.25, "[anon:sparse arena]", seed=3),
        ],
        label="4711 (redis-server)",
        kernel="6.18.44",
    )


def hostile() -> FakeSpace:
    """Return a process with hostile names."""
    mappings = [mixed((at + 1) << 32, 2, 0.6, name) for at, name in enumerate(HOSTILE)]
    return FakeSpace(mappings, label=f"1 ({HOSTILE[0]}{HOSTILE[1]}{HOSTILE[2]})", kernel=HOSTILE[1])


class HugeSpace(FakeSpace):
    """A process of one mapping of any size, generated as it is read: its parts differ, and it takes no memory.

    Args:
        size: bytes, whole PMD ranges.
    """

    START = 0x7000_0000_0000

    def __init__(self, size: int) -> None:
        super().__init__([], label="4711 (huge)")
        self._size = size

    def vmas(self) -> list[Vma]:
        return [Vma(self.START, self.START + self._size, "rw-p", "", VmaKind.ANON, frozenset({"hg"}), True)]

    def populated(self, segments: Sequence[Segment], granule: int) -> list[Segment]:
        return list(segments)

    def read(self, segments: Sequence[Segment]) -> PteColumns:
        page = np.concatenate([np.arange(start >> 12, end >> 12) for start, end in segments])
        range_, at = page >> 9, page & 511
        # Knuth's multiplicative hash, so that neighbours differ.
        level = range_ * 2654435761 % (1 << 32) >> 23
        order = np.where(level % 5 == 0, 9, np.where(level % 5 == 1, 4, 0)).astype(np.int8)
        there = ((at >> 4) * 40503 % 512 < level) | (order == 9)
        state = np.where(there, np.where(order == 9, int(Pte.PRESENT | Pte.PMD_MAPPED), int(Pte.PRESENT)), 0)
        return PteColumns(tuple(segments), state.astype(np.uint16), np.where(there, order, ORDER_NONE).astype(np.int8))
