"""plan_ranges against plain C: policy rfc, 51 200 ranges (100 GiB of x86-64), random runs of 1 to 48 PTEs.

The peer makes one 64-bit bitmap a range and walks it with popcount and an explicit stack, compiled with ``cc -O2``.
Both begin with a byte a PTE and make isolation's check as well; once for the folios alone, once with the plane of
orders, whose every byte is compared. For information also the walk alone, by the threshold only, with C's bitmaps
made beforehand: where nearly every range is collapsed whole, C has next to nothing left to do there.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
from numpy.typing import NDArray

import mthp
from peers import compiled, paired, show

RANGES = 51_200
PTES = 512


def random_runs(density: float, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Runs of 1 to 48 PTEs, each present with probability `density`: bool, shape (RANGES, PTES)."""
    lengths = rng.integers(1, 49, RANGES * PTES // 12)
    runs: NDArray[np.bool_] = np.repeat(rng.random(len(lengths)) < density, lengths)[: RANGES * PTES]
    return runs.reshape(RANGES, PTES)


def main() -> None:
    library = compiled("rfc_walk.c")
    library.rfc_walk.restype = library.rfc_plan.restype = ctypes.c_long
    rng = np.random.default_rng(20250210)
    for density in (0.7, 0.97):
        present = random_runs(density, rng)
        for max_ptes_none in (0, 64, 255):
            compare(library, present, max_ptes_none, f"density {density}, max_ptes_none {max_ptes_none}")


def compare(library: ctypes.CDLL, present: NDArray[np.bool_], max_ptes_none: int, name: str) -> None:
    """Print the three figures for one plane and limit."""
    orders = np.empty(present.shape, np.int8)
    full = present.reshape(RANGES, 64, 8).all(axis=2)
    bitmaps = np.packbits(full, axis=1, bitorder="little")

    def pointer(array: NDArray[Any]) -> ctypes.c_void_p:
        return ctypes.c_void_p(array.ctypes.data)

    def plan() -> mthp.Plan:
        return mthp.plan_ranges(present, policy="rfc", max_ptes_none=max_ptes_none)

    def plan_in_c(out: ctypes.c_void_p | None = None) -> int:
        folios: int = library.rfc_plan(pointer(present), ctypes.c_long(RANGES), max_ptes_none, out)
        return folios

    assert plan_in_c(pointer(orders)) == len(plan().folios), "the C peer plans otherwise"
    assert np.array_equal(plan().orders, orders), "the C peer plans otherwise"
    show(f"plan_ranges / C, {name}", paired(plan, plan_in_c), 1.0)
    show(f"plan_ranges().orders / C, {name}", paired(lambda: plan().orders, lambda: plan_in_c(pointer(orders))), 1.0)
    walk = paired(plan, lambda: library.rfc_walk(pointer(bitmaps), ctypes.c_long(RANGES), max_ptes_none))
    show(f"plan_ranges / C's walk of ready bitmaps, {name}", walk)


if __name__ == "__main__":
    main()
