"""Hot memory first, within a budget: page walks saved in the model of the TLB, and the speed of a real program.

The memory is 1 GiB. A tenth of it is hot, and a tenth of its bytes may be copied. All PMD ranges, hot or not, are at
random between 90 % and 100 % full.

1. *Simulated*: of all accesses 95 % go to the hot ranges, the rest to all; both random. Heat is every 997th access of
   another stretch of the same trace, as a profiler samples. Printed is the part of the page walks that a budgeted
   collapse saves, ranked by heat and by fullness: at least 80 % and at most 20 % are aimed at.
2. *Real*: processes with ten arenas, one of which each reads at random. The first stays as it is; two are collapsed
   within the budget by fullness, and by heat, as ``mthp collapse --heat 5s`` measures it here; the last whole. Printed
   are the random reads for each second of processor time, in turn, as medians with lowest and highest.

    python bench/bench_heat.py [--only simulated|real] [--seconds 5]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.budget import Amount
from mthp.engine.collapse import collapse_space
from mthp.engine.report import CollapseReport
from mthp.engine.select import PlanOptions
from mthp.geometry import X86_64
from mthp.heat import Heat
from mthp.lab.replay import mapped_after, replayed
from mthp.lab.tlb import PROCESSORS, Processor
from mthp.means import Means
from mthp.ptes import Pte
from mthp.results import BlockOutcome, ScanResult
from synthetic import BASE, PAGE, Synthetic

RANGES, HOT_RANGES = 512, 51
PTES, PMD = X86_64.ptes_per_pmd, X86_64.pmd_size
BUDGET = Amount(share=0.1)
ACCESSES = 1 << 20
TO_HOT = 0.95
SAMPLED = 997

SAVED_BY_HEAT, SAVED_BY_FULLNESS = 0.8, 0.2

ROUNDS = 9


class Collapsible(Synthetic):
    """Synthetic memory that can be collapsed."""

    def attempt(self, address: int, order: int) -> BlockOutcome:
        first = (address - BASE) // PAGE
        block = slice(first, first + (1 << order))
        contents = int(np.count_nonzero(self._state[block] & Pte.PRESENT))
        self._state[block], self._order[block] = Pte.PRESENT | Pte.PMD_MAPPED, order
        return BlockOutcome(address, order, ScanResult.SUCCEED, copied=contents, filled=(1 << order) - contents)


def memory(seed: int) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """Which pages are there, and which PMD ranges are hot."""
    rng = np.random.default_rng(seed)
    there = rng.random((RANGES, PTES)) < rng.uniform(0.9, 1.0, (RANGES, 1))
    return there.ravel(), np.sort(rng.choice(RANGES, HOT_RANGES, replace=False))


def trace(there: NDArray[np.bool_], hot: NDArray[np.intp], seed: int) -> NDArray[np.int64]:
    """Page numbers, in the order in which they are accessed."""
    rng = np.random.default_rng(seed)
    pages = np.flatnonzero(there)
    of_hot = pages[np.isin(pages // PTES, hot)]
    chosen = np.where(rng.random(ACCESSES) < TO_HOT, rng.choice(of_hot, ACCESSES), rng.choice(pages, ACCESSES))
    return (chosen + BASE // PAGE).astype(np.int64)


def sampled(pages: NDArray[np.int64]) -> Heat:
    """What a profiler sees of a trace: some of its addresses."""
    start = pages[::SAMPLED].astype(np.uint64) * np.uint64(PAGE)
    return Heat.of_spans(start, start + np.uint64(PAGE), np.ones(len(start)), source="samples")


def collapsed(there: NDArray[np.bool_], heat: Heat | None) -> tuple[Synthetic, CollapseReport]:
    """Return the memory after a collapse within the budget."""
    space = Collapsible(there.copy(), label="tenth hot")
    options = PlanOptions(policy="pmd-only", trigger="madvise", heat=heat)
    return space, collapse_space(space, options, Means("madvise", max_bloat=None, max_copied=BUDGET))


def walks(space: Synthetic, pages: NDArray[np.int64], processor: Processor) -> int:
    """The page walks that a trace takes."""
    mapped = mapped_after(space, PlanOptions(policy="pmd-only"), 0)
    return replayed(lambda: [pages], mapped, processor, PAGE).walks


def simulated() -> bool:
    """Print what is saved in the model; return whether the aims are met."""
    met = True
    print(f"page walks that a collapse of a tenth of the bytes saves, {ACCESSES:,} accesses")
    for name, processor in PROCESSORS.items():
        saved: dict[str, list[float]] = {"by heat": [], "by fullness": []}
        for seed in range(3):
            there, hot = memory(seed)
            heat, pages = sampled(trace(there, hot, seed + 100)), trace(there, hot, seed + 200)
            before = walks(Synthetic(there, label="before"), pages, processor)
            for how, chosen in (("by heat", heat), ("by fullness", None)):
                space, report = collapsed(there, chosen)
                assert report.copied_bytes <= BUDGET.of(int(np.count_nonzero(there)) * PAGE)
                saved[how].append(1 - walks(space, pages, processor) / before)
        fine = min(saved["by heat"]) >= SAVED_BY_HEAT and max(saved["by fullness"]) <= SAVED_BY_FULLNESS
        met &= fine
        spread = "   ".join(f"{how}: {min(each):6.1%} to {max(each):6.1%}" for how, each in saved.items())
        print(f"  {name:<12} {spread}   {'ok' if fine else 'MISSED'}")
    return met


_PROGRAM = """
import ctypes, json, mmap, sys, time
import numpy as np
arenas, hot, pmd, page = map(int, sys.argv[1:5])
libc = ctypes.CDLL(None)
libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
ranges = 51
step = (ranges + 1) * pmd
memory = mmap.mmap(-1, arenas * step + pmd, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
first = -start % pmd
libc.madvise(start + first, arenas * step, 15)  # MADV_NOHUGEPAGE while it is filled
rng = np.random.default_rng(1)
words = np.frombuffer(memory, np.uint64)
there = None
for arena in range(arenas):
    low = first + arena * step
    full = rng.random((ranges, pmd // page)) < rng.uniform(0.9, 1.0, (ranges, 1))
    pages = np.flatnonzero(full)
    words[(low + pages * page) // 8] = 1
    if arena == hot:
        there = (low + pages * page) // 8
    libc.mprotect(start + low + ranges * pmd, pmd, 0)
for arena in range(arenas):
    libc.madvise(start + first + arena * step, ranges * pmd, 14)
reads = 1 << 21
places = rng.choice(there, reads) + rng.integers(0, page // 8, reads)
out = np.empty(reads, np.uint64)
print("ready", flush=True)
for line in sys.stdin:
    if line.strip() == "use":
        until = time.monotonic() + float(next(sys.stdin))
        while time.monotonic() < until:
            np.take(words, places, out=out)
        print("used", flush=True)
    else:
        begin = time.thread_time()
        for _ in range(4):
            np.take(words, places, out=out)
        print(4 * reads / (time.thread_time() - begin), flush=True)
"""


class Program:
    """A process with ten arenas, of which it reads one."""

    def __init__(self) -> None:
        arguments = [str(each) for each in (10, 7, PMD, PAGE)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        assert self.answer() == "ready"

    def answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def tell(self, text: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(text)
        self._process.stdin.flush()

    def speed(self) -> float:
        self.tell("measure\n")
        return float(self.answer())

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def collapse(program: Program, *options: str) -> str:
    """Collapse a program's memory; say what came of it."""
    command = [
        sys.executable,
        "-m",
        "mthp",
        "collapse",
        str(program.pid),
        "--policy",
        "pmd-only",
        "--max-bloat",
        "none",
    ]
    done = subprocess.run([*command, *options, "--json"], capture_output=True, text=True, check=False)
    if done.returncode > 1:
        sys.exit(done.stderr)
    report = json.loads(done.stdout)
    told = f"{report['copied_bytes'] >> 20} MiB copied in {report['elapsed_seconds']:.2f} s"
    if (heat := report["plan"]["heat"]) is not None:
        told += f"; heat by {heat['source']} in {heat['seconds']:.1f} s, {heat['cpu_share']:.1%} of one processor"
    return told


def real(seconds: float) -> None:
    """Print the speed of processes in turn."""
    budget = ("--max-copied", str(BUDGET))
    settings: dict[str, Sequence[str] | None] = {
        "as it is": None,
        "a tenth, by fullness": budget,
        "a tenth, by heat": (*budget, "--heat", f"{seconds:g}s"),
        "all of it": (),
    }
    with contextlib.ExitStack() as stack:
        programs = {name: Program() for name in settings}
        for program in programs.values():
            stack.callback(program.close)
        told = {}
        for name, options in settings.items():
            program = programs[name]
            if options is None:
                continue
            heated = "--heat" in options
            if heated:
                program.tell(f"use\n{seconds + 10}\n")
            told[name] = collapse(program, *options)
            if heated:
                program.answer()
        speeds: dict[str, list[float]] = {name: [] for name in settings}
        for _ in range(ROUNDS + 1):
            for name, program in programs.items():
                speeds[name].append(program.speed())
    base = statistics.median(speeds["as it is"][1:])
    print("random reads of the hot tenth for each second of processor time, of 1 GiB")
    for name, each in speeds.items():
        median = statistics.median(each[1:])
        spread = f"{min(each[1:]) / 1e6:.1f} to {max(each[1:]) / 1e6:.1f}"
        print(f"  {name:<22} {median / 1e6:6.1f} million ({spread}), {median / base:4.2f} times   {told.get(name, '')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("simulated", "real"), help="one of the two parts")
    parser.add_argument("--seconds", type=float, default=5.0, help="for which heat is measured")
    arguments = parser.parse_args()
    met = arguments.only == "real" or simulated()
    if arguments.only != "simulated":
        real(arguments.seconds)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
