"""Measure a sweep of 1 000 synthetic snapshots of 4 GiB by 16 settings on two processors, from a part of it.

The peer is one processor with the same work, so the ratio shows whether time falls with processors. The peak of memory
is that of all processes of the sweep together. ``--whole`` sweeps all 1 000.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from mthp.lab.grid import Grid
from mthp.lab.runners import local
from mthp.lab.sweep import inputs_in, sweep
from mthp.snapshot import record
from peers import Pair, show
from synthetic import Synthetic

PAGES = (4 << 30) // 4096
WHOLE = 1000
SECONDS_AIM = 600.0
MEMORY_AIM = 2 << 30

GRID = Grid(policies=("rfc", "per-order", "mainline", "no-creep"), max_ptes_none=(0, 64, 256, 511))


def heap(seed: int) -> Synthetic:
    """4 GiB of heap with holes: runs of 1 to 96 pages, of which a part differing by seed is there, and some folios."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 97, PAGES // 40)
    there = rng.random(len(lengths)) < rng.uniform(0.6, 0.98)
    pages = np.repeat(there, lengths)[:PAGES]
    return Synthetic(pages, rng.random(PAGES // 512) < 0.1, label=str(seed))


class Peak:
    """Memory and processor time of this process and its descendants, sampled while they run.

    Attributes:
        bytes: the most memory that they had at once: proportional set size.
        seconds: their processor time.
    """

    def __init__(self) -> None:
        self.bytes, self.seconds = 0, 0.0
        self._begin = sum(map(_processor_time, _family(os.getpid())))
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            family = _family(os.getpid())
            self.bytes = max(self.bytes, sum(map(_memory, family)))
            self.seconds = max(self.seconds, sum(map(_processor_time, family)) - self._begin)


def _family(pid: int) -> list[int]:
    children: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children += [int(word) for word in task.read_text().split()]
        except OSError:
            continue
    return [pid, *(each for child in children for each in _family(child))]


def _memory(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("Pss:"))


def _processor_time(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def timed(directory: Path, output: Path, jobs: int) -> float:
    begin = time.perf_counter()
    report = sweep(inputs_in(directory), GRID, output, local(jobs))
    assert not report.failed
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--whole", action="store_true", help="all 1 000 snapshots")
    parser.add_argument("--inputs", type=int, default=40, metavar="N", help="how many otherwise")
    options = parser.parse_args()
    count = WHOLE if options.whole else options.inputs
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name) / "inputs"
        directory.mkdir()
        for seed in range(count):
            record(heap(seed), directory / f"{seed:04}.parquet")
        with Peak() as peak:
            two = timed(directory, Path(name) / "two.parquet", 2)
        if not options.whole:
            one = timed(directory, Path(name) / "one.parquet", 1)
            assert (Path(name) / "one.parquet").read_bytes() == (Path(name) / "two.parquet").read_bytes()
            show(
                f"sweep of {count} by {len(GRID.settings())} with 2 processes / with 1", Pair(two, one, two / one), 0.7
            )
        whole = two * WHOLE / count
        print(
            f"{WHOLE} snapshots of 4 GiB by {len(GRID.settings())} settings: {whole:.0f} s, at most {SECONDS_AIM:.0f};"
            f" {peak.seconds * WHOLE / count:.0f} s of processor time"
        )
        print(f"peak memory: {peak.bytes >> 20} MiB, at most {MEMORY_AIM >> 20}")


if __name__ == "__main__":
    main()
