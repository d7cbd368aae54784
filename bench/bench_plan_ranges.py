"""Compare plan_ranges with plain C: policy rfc, 51 200 ranges (100 GiB of x86-64), random runs of 1 to 48 PTEs.

The peer (``rfc_walk.c``, compiled with ``cc -O2``) compares eight PTEs at a time, walks a 64-bit bitmap a range with an
explicit stack, and writes the order of each page's folio into an existing array. `plan_ranges` does the same for any
geometry and all states of a PTE, applies isolation's limits, and allocates its result. With max_ptes_none 0 isolation
changes nothing, so every byte is compared.
"""

from __future__ import annotations

import ctypes

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
    library.plan_all.restype = ctypes.c_long
    rng = np.random.default_rng(20250210)
    for density in (0.7, 0.97):
        present = random_runs(density, rng)
        for max_ptes_none in (0, 64, 255):
            compare(library, present, max_ptes_none, f"density {density}, max_ptes_none {max_ptes_none}")


def compare(library: ctypes.CDLL, present: NDArray[np.bool_], max_ptes_none: int, name: str) -> None:
    """Print the figure for one plane and limit."""
    orders = np.zeros(present.shape, np.int8)
    enabled = sum(1 << order for order in range(3, 10))
    arguments = (
        ctypes.c_void_p(present.ctypes.data),
        ctypes.c_long(RANGES),
        ctypes.c_ulong(enabled),
        max_ptes_none,
        ctypes.c_void_p(orders.ctypes.data),
    )

    def plan() -> NDArray[np.int8]:
        return mthp.plan_ranges(present, policy="rfc", max_ptes_none=max_ptes_none).orders

    def plan_in_c() -> int:
        pages: int = library.plan_all(*arguments)
        return pages

    plan_in_c()
    assert max_ptes_none or np.array_equal(plan(), orders), "the C peer plans otherwise"
    show(f"plan_ranges().orders / C, {name}", paired(plan, plan_in_c), 1.0)


if __name__ == "__main__":
    main()
