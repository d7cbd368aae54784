"""Compare the model of the TLB with the same LRU array in plain C: a million accesses, random and in strides.

The model is that of the last level of three processors. In a random trace every access is looked up; in a trace that
uses each page several times in a row, the model skips most of them.
"""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from mthp.lab.tlb import Processor, lru_misses
from peers import compiled, paired, show

ACCESSES = 1 << 20
PAGES = 1 << 14


def compare(library: ctypes.CDLL, name: str, what: str, tags: NDArray[np.int64]) -> None:
    """Print the figure of one processor and trace."""
    [structure] = Processor.named(name).levels[-1]

    def in_c() -> int:
        pointer = ctypes.c_void_p(tags.ctypes.data)
        missed: int = library.lru_misses(pointer, ctypes.c_long(len(tags)), structure.sets, structure.ways)
        return missed

    def ours() -> int:
        return int(lru_misses(tags, structure.sets, structure.ways).sum())

    assert ours() == in_c(), "the C peer counts otherwise"
    show(f"TLB misses / C, {name}, {what}", paired(ours, in_c, rounds=3))


def main() -> None:
    library = compiled("tlb_lru.c")
    library.lru_misses.restype = ctypes.c_long
    library.lru_misses.argtypes = (ctypes.c_void_p, *(ctypes.c_long,) * 3)
    rng = np.random.default_rng(7)
    for name in ("skylake", "zen4", "neoverse-n1"):
        compare(library, name, "random", rng.integers(0, PAGES, ACCESSES))
        compare(library, name, "in order, 16 times each", np.arange(ACCESSES, dtype=np.int64) // 16 % PAGES)


if __name__ == "__main__":
    main()
