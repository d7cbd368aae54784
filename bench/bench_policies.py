"""Compare `no-creep` with the other policies at an intermediate fill, on a recording of redis and on synthetic memory.

For each memory and policy, with max_ptes_none at 64 of 512: the share of memory in folios of 64 KiB and more, and
mapped as 2 MiB, once scans no longer change anything; the memory that the first scan adds, and that all scans add; and
the number of scans that add any. The peers of `no-creep` are all other policies: it is marked where none of them covers
as much with as little bloat.

    python bench/bench_policies.py [--keep DIRECTORY]

``--keep`` keeps the recording of redis, so that ``mthp report`` can draw its creep. Without redis-server (Debian:
redis) only synthetic memory is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace
from mthp.geometry import X86_64
from mthp.lab.compare import DEFAULT_POLICIES, compare, settings_of
from mthp.snapshot import Pace, Recording, record_series
from mthp.targets import open_target
from programs import lacking, redis
from synthetic import Synthetic

N = X86_64.ptes_per_pmd
RANGES = 256
COVERED = X86_64.parse_order("64K")


def strewn(density: float) -> NDArray[np.bool_]:
    """Pages that are there or not, each by itself."""
    return np.random.default_rng(1).random(RANGES * N) < density


def half_strewn(density: float) -> NDArray[np.bool_]:
    """Return the first half of every PMD range nearly full (19 of 20 pages), the other as :func:`strewn`."""
    there = strewn(density).reshape(RANGES, N)
    there[:, : N // 2] = strewn(0.95).reshape(RANGES, N)[:, : N // 2]
    return there.ravel()


def runs(pages: int, density: float) -> NDArray[np.bool_]:
    """Return a mapping of aligned runs that are present as a whole or not at all."""
    return np.repeat(np.random.default_rng(1).random(RANGES * N // pages) < density, pages)


SHAPES: dict[str, Callable[[], NDArray[np.bool_]]] = {
    "95% of all pages": lambda: strewn(0.95),
    "85% of all pages": lambda: strewn(0.85),
    "half of each 2M at 95%, half at 40%": lambda: half_strewn(0.4),
    "half of each 2M at 95%, half empty": lambda: half_strewn(0.0),
    "75% of runs of 64K": lambda: runs(16, 0.75),
    "75% of runs of 256K": lambda: runs(64, 0.75),
}


def show(name: str, space: AddressSpace) -> None:
    """Print one row for each policy."""
    result = compare(space, settings_of(DEFAULT_POLICIES, max_ptes_none=[64]), scans=None, covered=COVERED)
    before = int(result.outcomes[0].scans[0].by_order.sum())
    for outcome, best in zip(result.outcomes, result.frontier, strict=True):
        bloat = [scan.filled / before for scan in outcome.scans]
        added = sum(after > was for was, after in itertools.pairwise(bloat))
        huge = outcome.scans[-1].pmd_mapped / int(outcome.scans[-1].by_order.sum())
        cells = [name, outcome.policy, f"{result.coverage(outcome):.1%}", f"{huge:.1%}", f"{bloat[1]:.1%}"]
        print("| " + " | ".join([*cells, f"{bloat[-1]:.1%}", str(added), "yes" if best else ""]) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, help="a directory that the recording stays in")
    options = parser.parse_args()
    heads = ("memory", "policy", "in 64K and more", "mapped as 2M", "bloat after one scan", "in the end")
    print("| " + " | ".join([*heads, "scans that add", "on the frontier"]) + " |\n|" + "---|" * 8)
    with contextlib.ExitStack() as stack:
        place = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(exist_ok=True)
        if not lacking("redis"):
            path = place / "redis.recording"
            with redis(place) as running, open_target(str(running.pid)) as live:
                record_series(live, path, Pace(every=0.2, duration=0.5), overwrite=True)
            show("redis, 1 GiB, an eighth deleted", Recording(path).space())
        for name, shape in SHAPES.items():
            show(name, Synthetic(shape(), label=name))


if __name__ == "__main__":
    main()
