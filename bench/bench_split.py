"""Measure splits and trims in place: time in the kernel's calls, mthp's own time, and the waits of the target.

*Split* (where debugfs is open): the mechanism split makes random layouts of ranges of 2 MiB that are 40 % full. The
peer is MADV_COLLAPSE of the same ranges in the same run, which is the first of the calls that split makes. Time in
calls is that of process_madvise(2) and of writes to ``split_huge_pages``; the rest is mthp's reads and checks.

*Trim*: huge pages with a tenth in use are read (which pages hold zeroes) and trimmed, in GB/s of folio memory, with the
target's threads stopped, and with one that uses its pages meanwhile. Their waits are printed beside those of a control:
another process with the same threads and memory, at the same time, on which mthp does not work. Waits that both have
come from the scheduler; the difference is the kernel's work on the target. MADV_COLLAPSE is measured in the same way.

Needs root.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from mthp.linux.live import LiveAddressSpace, open_live
from mthp.linux.process import Process
from mthp.means import Means
from mthp.ptes import Block
from mthp.results import ScanResult
from mthp.trimming import TrimBy
from split_targets import Churn

ROUNDS = 3
CALL_AIM, TRIM_AIM = 1.3, 1.0
SHARES = (0.5, 0.99)


class Calls:
    """Sums the time spent in the kernel's calls, by the kind of call."""

    def __init__(self) -> None:
        self.ns = {"collapse": 0, "split": 0}
        self._advise, self._write = Process.advise, os.write

    def __enter__(self) -> Calls:
        def timed(kind: str, call: Callable[..., int]) -> Callable[..., int]:
            def inner(*arguments: object) -> int:
                begin = time.perf_counter_ns()
                result = call(*arguments)
                self.ns[kind] += time.perf_counter_ns() - begin
                return result

            return inner

        Process.advise = timed("collapse", self._advise)  # type: ignore[method-assign]
        # What splits, apart from the text that is written.
        os.write = timed("split", self._write)
        return self

    def __exit__(self, *_: object) -> None:
        Process.advise, os.write = self._advise, self._write  # type: ignore[method-assign]


def waits(histogram: Sequence[int]) -> str:
    """The waits of the target's accesses: upper bounds of the median, of 99 %, of 99.99 %, and the longest."""
    total = sum(histogram)
    bounds = []
    for share in (*SHARES, 0.9999, 1.0):
        bucket = next(at for at, through in enumerate(itertools.accumulate(histogram)) if through >= share * total)
        bounds.append(f"{(2 << bucket) / 1000:g}")
    return "p50 {} us, p99 {} us, p99.99 {} us, longest {} us".format(*bounds)


def layout(space: LiveAddressSpace, address: int, rng: random.Random) -> list[Block]:
    """Random blocks in a PMD range."""
    geometry, blocks = space.geometry, []

    def place(first: int, order: int) -> None:
        if order < 2:
            return
        if order < geometry.pmd_order and rng.random() < 0.3:
            blocks.append((address + first * geometry.page_size, order))
        elif rng.random() < 0.9:
            place(first, order - 1)
            place(first + (1 << order - 1), order - 1)

    while not blocks:
        place(0, geometry.pmd_order)
    return blocks


def bench_split() -> bool:
    """Print what splitting takes, against the collapse alone."""
    rng, made, wall = random.Random(1), 0, 0
    size = 0
    with Calls() as calls:
        for _ in range(ROUNDS):
            with Churn(1, 64, 40, "h") as churn, open_live(churn.pid) as space:
                os.kill(churn.pid, signal.SIGSTOP)
                size = space.geometry.pmd_size
                for address in range(churn.address, churn.address + churn.size, size):
                    blocks = layout(space, address, rng)
                    begin = time.perf_counter_ns()
                    outcomes = space.collapse_blocks(blocks, Means("split"))
                    wall += time.perf_counter_ns() - begin
                    made += sum(outcome.result is ScanResult.SUCCEED for outcome in outcomes)
    ranges = ROUNDS * (64 << 20) // size
    collapse, split = calls.ns["collapse"], calls.ns["split"]
    ratio = (collapse + split) / collapse
    print(f"split: {ranges} ranges, {made} folios; a range: collapse {collapse / ranges / 1000:.0f} us,", end=" ")
    print(f"splits {split / ranges / 1000:.0f} us, our own {(wall - collapse - split) / ranges / 1000:.0f} us")
    print(f"  in the kernel's calls {ratio:.2f} times MADV_COLLAPSE alone (aim: at most {CALL_AIM})")
    return ratio <= CALL_AIM


def bench_trim() -> bool:
    """Print how fast folios are trimmed by each way that works here, and what the target's threads wait."""
    fine = True
    with Churn(1, 64, 10, "h") as churn, Churn(1, 64, 10, "h") as control, open_live(churn.pid) as space:
        blocks = [
            (address, space.geometry.pmd_order)
            for address in range(churn.address, churn.address + churn.size, space.geometry.pmd_size)
        ]
        for _ in range(ROUNDS):
            space.collapse_blocks(blocks)
        churn.finish()
        control.finish()
        print(f"MADV_COLLAPSE: {waits(churn.waits)}")
        print(f"  control:     {waits(control.waits)}")
        ways = space.trims_by
    for by in ways:
        stopped, beside = Trims(by, stopped=True), Trims(by, stopped=False)
        print(f"trim by {by}: {stopped.rate:.2f} GB/s of folios ({stopped.looking:.0%} of it looking), and")
        print(f"  {beside.rate:.2f} beside a thread that writes (aim: at least {TRIM_AIM:g} GB/s while they rest);")
        wrong = stopped.wrong + beside.wrong
        print(f"  {stopped.given >> 20} of {stopped.looked >> 20} MiB given back; {wrong} words wrong")
        print(f"  thread beside it: {waits(beside.waits)}")
        print(f"  control:          {waits(beside.control_waits)}")
        fine &= stopped.rate >= TRIM_AIM and not wrong
    return fine


class Trims:
    """Folios trimmed in some targets.

    Attributes:
        looked, given: bytes of folios, and of what went back.
        wrong: words that were not as the target left them.
        waits: of the target's accesses.
        control_waits: of those of another process like it, which runs whenever the target does.
    """

    def __init__(self, by: TrimBy, *, stopped: bool) -> None:
        self.looked = self.given = self.wrong = self._ns = self._looking_ns = 0
        self.waits, self.control_waits = [0] * 40, [0] * 40
        for _ in range(ROUNDS):
            with (
                Churn(1, 64, 10, "h") as churn,
                Churn(1, 64, 10, "h") as control,
                open_live(churn.pid) as space,
            ):
                self._trim(space, churn, control, by, stopped=stopped)
                self.wrong += churn.finish() + control.finish()
                self.waits = [sum(pair) for pair in zip(churn.waits, self.waits, strict=True)]
                self.control_waits = [sum(pair) for pair in zip(control.waits, self.control_waits, strict=True)]

    def _trim(self, space: LiveAddressSpace, churn: Churn, control: Churn, by: TrimBy, *, stopped: bool) -> None:
        geometry = space.geometry
        ranges = range(churn.address, churn.address + churn.size, geometry.pmd_size)
        folios = [(address, geometry.pmd_order) for address in ranges]
        both = churn.pid, control.pid
        # Made huge before anything is timed.
        for pid in both:
            os.kill(pid, signal.SIGSTOP)
        space.collapse_blocks(folios)
        if not stopped:
            for pid in both:
                os.kill(pid, signal.SIGCONT)
        begin = time.perf_counter_ns()
        zero = space.zero_filled(space.read([(churn.address, churn.address + churn.size)])).reshape(len(ranges), -1)
        self._looking_ns += time.perf_counter_ns() - begin
        outcomes = space.trim_folios(folios, list(zero), by)
        self._ns += time.perf_counter_ns() - begin
        if stopped:
            for pid in both:
                os.kill(pid, signal.SIGCONT)
        self.looked += churn.size
        self.given += sum(outcome.given_back for outcome in outcomes) * geometry.page_size

    @property
    def rate(self) -> float:
        """Return the folio memory that was read and split, in GB/s."""
        return self.looked / self._ns

    @property
    def looking(self) -> float:
        """Return the share of the time that looking took."""
        return self._looking_ns / self._ns


def main() -> int:
    """Print all figures."""
    with open_live("self") as space:
        splits = space.splits()
    fine = bench_trim()
    if splits:
        fine &= bench_split()
    else:
        print("split: not measured, since folios cannot be split here (mthp doctor says why)")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
