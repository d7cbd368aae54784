"""A large simulated process: built, scanned and collapsed under `mainline`, at several sizes.

Each size is a process with one mapping, written with base pages all over, with the last page of every second PMD range
missing; khugepaged then goes over it once with the PMD size enabled. Prints seconds of CPU time, bytes of memory an
entry (all arrays of the simulator together, and what the process took from the system), and how time and memory grow
from one size to the next: 1.00 is linear.

    python bench/bench_sim_scale.py [GIB ...]      by default 4 16 64
"""

from __future__ import annotations

import argparse
import math
import resource
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np

from mthp.sim import Machine
from mthp.sim.mm import HUGEPAGE
from mthp.tunables import Switches, Tunables

GIB = 1 << 30
START = 1 << 30


@dataclass(frozen=True)
class Figures:
    """What one size took."""

    ptes: int
    build: float
    collapse: float
    array_bytes: int
    peak_bytes: int
    collapsed: int
    digest: str


def measure(gib: int) -> Figures:
    size = gib * GIB
    ptes = size // 4096
    started = time.process_time()
    machine = Machine(
        node_frames=[ptes + 64 * 512],
        switches=Switches("madvise", {9: "madvise"}),
        tunables=Tunables(511, 64, 256, 1 << 30),
    )
    mm = machine.create_mm()
    machine.map(mm, START, START + size, flags={HUGEPAGE})
    machine.thp_disable(mm, True)
    machine.populate(mm, START, START + size)
    ends = np.arange(START + machine.geometry.pmd_size, START + size + 1, 2 * machine.geometry.pmd_size)
    for end in ends.tolist():
        machine.madvise(mm, end - 4096, end, "DONTNEED")
    machine.thp_disable(mm, False)
    built = time.process_time()
    machine.khugepaged.full_scan()
    done = time.process_time()
    collapsed = machine.counters["pages_collapsed"]
    assert collapsed == ptes // 512, f"{collapsed} of {ptes // 512} PMD ranges were collapsed"
    return Figures(
        ptes,
        built - started,
        done - built,
        machine.array_bytes(),
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        collapsed,
        machine.digest(),
    )


def measured_apart(gib: int) -> Figures:
    """Measured in a process of its own, so that its peak memory is its own."""
    command = [sys.executable, __file__, "--one", str(gib)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    values = output.split()
    return Figures(
        int(values[0]), float(values[1]), float(values[2]), int(values[3]), int(values[4]), int(values[5]), values[6]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gib", nargs="*", type=int, default=[4, 16, 64])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one = measure(options.one)
        print(one.ptes, one.build, one.collapse, one.array_bytes, one.peak_bytes, one.collapsed, one.digest)
        return
    print(f"{'GiB':>5} {'PTEs':>12} {'build s':>8} {'collapse s':>10} {'B/PTE arrays':>12} {'B/PTE peak':>10}  slopes")
    last: Figures | None = None
    for gib in options.gib:
        now = measured_apart(gib)
        slopes = ""
        if last is not None:
            growth = math.log(now.ptes / last.ptes)
            times = math.log((now.build + now.collapse) / (last.build + last.collapse)) / growth
            memory = math.log(now.array_bytes / last.array_bytes) / growth
            slopes = f"time {times:.2f}, memory {memory:.2f}"
        per_pte = f"{now.array_bytes / now.ptes:12.2f} {now.peak_bytes / now.ptes:10.2f}"
        print(f"{gib:5} {now.ptes:12} {now.build:8.2f} {now.collapse:10.2f} {per_pte}  {slopes}")
        last = now


if __name__ == "__main__":
    main()
