"""Measure the costs of operations on this kernel, and print the table of the simulated machine's clock.

Every figure is the difference of two measurements that differ in one operation, each the best of a few runs. A cost
that cannot be measured here (no root, no swap, no debugfs) keeps its default, and the table marks it. As root it
switches folio sizes and khugepaged's tunables for a moment, and puts them back.

    python bench/measure_costs.py            a table
    python bench/measure_costs.py --toml     lines for the [costs] section of a scenario
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mthp.sim.clock import Costs

THP = Path("/sys/kernel/mm/transparent_hugepage")
PAGE, HUGE = mmap.PAGESIZE, 2 << 20
MADV_COLD, MADV_PAGEOUT, MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_COLLAPSE = 20, 21, 22, 23, 25
RUNS = 3

Measured = dict[str, tuple[float, str]]
"""By the name of the cost: seconds, and how they were measured."""


class Memory:
    """Anonymous memory, aligned to huge folios."""

    def __init__(self, size: int, *, huge: bool) -> None:
        self._map = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._map.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
        whole = np.frombuffer(self._map, np.uint8)
        self.offset = -whole.ctypes.data % HUGE
        self.bytes = whole[self.offset : self.offset + size]
        self.size = size

    @property
    def address(self) -> int:
        return int(self.bytes.ctypes.data)

    def touch(self, step: int, first: int = 0) -> None:
        self.bytes[first::step] = 1

    def advise(self, advice: int, start: int = 0, size: int | None = None) -> None:
        self._map.madvise(advice, self.offset + start, self.size if size is None else size)


def best(run: Callable[[], float]) -> float:
    """The shortest of a few runs, in seconds."""
    return min(run() for _ in range(RUNS))


def timed(action: Callable[[], object], clock: Callable[[], float] = time.process_time) -> float:
    """Seconds of CPU time, the kernel's on behalf of this process included: what else runs meanwhile does not count."""
    started = clock()
    action()
    return clock() - started


@contextlib.contextmanager
def switched(values: dict[Path, str]) -> Iterator[None]:
    """Files of sysfs with other values for a while."""
    before = {}
    try:
        for path, value in values.items():
            text = path.read_text()
            before[path] = text[text.index("[") + 1 : text.index("]")] if "[" in text else text
            path.write_text(value)
        yield
    finally:
        for path, value in before.items():
            path.write_text(value)


def faults(size: int = 256 << 20) -> Measured:
    """Faults, allocation and clearing: what differs between filling in base pages, huge ones, and the zero page."""

    def filled(*, huge: bool, step: int) -> float:
        memory = Memory(size, huge=huge)
        return timed(lambda: memory.touch(step))

    def populated(advice: int) -> float:
        memory = Memory(size, huge=False)
        return timed(lambda: memory.advise(advice))

    def freed() -> float:
        memory = Memory(size, huge=False)
        memory.touch(PAGE)
        return timed(lambda: memory.advise(mmap.MADV_DONTNEED))

    pages = size // PAGE
    file = THP / "hugepages-2048kB/enabled"
    with switched({file: "always"} if os.access(file, os.W_OK) else {}):
        zero = best(lambda: filled(huge=True, step=HUGE)) / size
    clearing = zero * PAGE
    small = (best(lambda: populated(MADV_POPULATE_WRITE)) - best(lambda: populated(MADV_POPULATE_READ))) / pages
    fault = best(lambda: filled(huge=False, step=PAGE)) / pages
    alloc = max(small - clearing, 0)
    return {
        "zero_byte": (zero, "faults of 2 MiB folios, by their size"),
        "alloc_small": (alloc, "populating with pages less with the zero page, less clearing"),
        "fault": (fault - clearing - alloc, "a fault of a base page, less clearing and allocation"),
        "free_folio": (best(freed) / pages, "MADV_DONTNEED of base pages"),
    }


def large_faults(known: Measured, size: int = 256 << 20) -> Measured:
    """Allocation of large folios: a fault of 64 KiB, less what a fault and clearing take."""
    with switched({THP / "hugepages-64kB/enabled": "madvise", THP / "hugepages-2048kB/enabled": "never"}):

        def filled() -> float:
            memory = Memory(size, huge=True)
            return timed(lambda: memory.touch(64 << 10))

        each = best(filled) / (size >> 16)
    spare = each - known["fault"][0] - known["zero_byte"][0] * (64 << 10)
    return {"alloc_large": (max(spare, known["alloc_small"][0]), "a fault of a 64 KiB folio, less fault and clearing")}


def copies(known: Measured, size: int = 128 << 20) -> Measured:
    """Copying, and what a collapse takes beside it: MADV_COLLAPSE of full ranges and of ranges with one page."""
    source, target = Memory(size, huge=True), Memory(size, huge=True)
    source.touch(PAGE)
    target.touch(PAGE)
    copy = best(lambda: timed(lambda: np.copyto(target.bytes, source.bytes))) / size

    def collapsed(step: int) -> float:
        memory = Memory(size, huge=False)
        memory.touch(step)
        memory.advise(mmap.MADV_HUGEPAGE)
        return timed(lambda: memory.advise(MADV_COLLAPSE))

    ranges, pages = size // HUGE, HUGE // PAGE
    full, thin = best(lambda: collapsed(PAGE)) / ranges, best(lambda: collapsed(HUGE)) / ranges
    full -= copy * HUGE
    thin -= copy * PAGE + known["zero_byte"][0] * (HUGE - PAGE)
    each = max(full - thin, 0) / (pages - 1)
    return {
        "copy_byte": (copy, "copying 128 MiB"),
        "collapse_pte": (each, "MADV_COLLAPSE of a full range less one of a range with one page, by pages"),
        "collapse": (max(thin - each, 0), "MADV_COLLAPSE of a range with one page, less copying and clearing"),
    }


def scans(size: int = 1 << 30) -> Measured:
    """Khugepaged's CPU time at full throttle: over ranges that lack their last page, and their first."""
    daemon = next(path.parent for path in Path("/proc").glob("[0-9]*/comm") if path.read_text() == "khugepaged\n")
    tick = os.sysconf("SC_CLK_TCK")

    def seconds_a_scan(missing: int) -> float:
        memory = Memory(size, huge=False)
        memory.touch(PAGE)
        for start in range(0, size, HUGE):
            memory.advise(mmap.MADV_DONTNEED, start + missing, PAGE)
        memory.advise(mmap.MADV_HUGEPAGE)
        time.sleep(0.5)

        def now() -> tuple[int, int]:
            ticks = (daemon / "stat").read_text().rsplit(")", 1)[1].split()
            return int((THP / "khugepaged/full_scans").read_text()), int(ticks[11]) + int(ticks[12])

        scans, used = now()
        time.sleep(4)
        scans_after, used_after = now()
        return (used_after - used) / tick / max(scans_after - scans, 1)

    fast = {"max_ptes_none": "0", "pages_to_scan": "100000000", "scan_sleep_millisecs": "0"}
    with switched({THP / "khugepaged" / name: value for name, value in fast.items()}):
        whole, first = seconds_a_scan(HUGE - PAGE), seconds_a_scan(0)
    ranges, pages = size // HUGE, HUGE // PAGE
    each = (whole - first) / ranges / (pages - 1)
    return {
        "scan_pte": (each, "khugepaged over 1 GiB whose ranges lack their last page, less such that lack their first"),
        "scan_range": (max(first / ranges - each, 0), "khugepaged over 1 GiB whose ranges lack their first page"),
    }


def ageing(size: int = 256 << 20) -> Measured:
    """MADV_COLD over base pages."""
    memory = Memory(size, huge=False)

    def aged() -> float:
        memory.touch(PAGE)
        return timed(lambda: memory.advise(MADV_COLD))

    return {"reclaim_pte": (best(aged) / (size // PAGE), "MADV_COLD of base pages")}


def calls() -> Measured:
    """A system call that does nothing."""

    def loop(action: Callable[[], object]) -> float:
        return timed(lambda: [action() for _ in range(200_000)]) / 200_000

    return {"syscall": (max(best(lambda: loop(os.getppid)) - best(lambda: loop(int)), 0), "getppid(2)")}


def splits(size: int = 64 << 20) -> Measured:
    """Splitting by debugfs: folios of 2 MiB, and of 64 KiB."""
    file = Path("/sys/kernel/debug/split_huge_pages")

    def split(word_2m: str, word_64k: str, folio: int) -> float:
        switches = {THP / "hugepages-64kB/enabled": word_64k, THP / "hugepages-2048kB/enabled": word_2m}
        with switched(switches):
            memory = Memory(size, huge=True)
            memory.touch(PAGE)
        order = f"{os.getpid()},{memory.address:#x},{memory.address + size:#x},0"
        return timed(lambda: file.write_text(order)) / (size // folio)

    huge, small = split("always", "never", HUGE), split("never", "always", 64 << 10)
    each = max(huge - small, 0) / (HUGE // PAGE - 16)
    return {
        "split_page": (each, "split_huge_pages of 2 MiB folios less 64 KiB folios, by pages"),
        "split_folio": (max(small - 16 * each, 0), "split_huge_pages of 64 KiB folios, less their pages"),
    }


def swapping(size: int = 64 << 20) -> Measured:
    """MADV_PAGEOUT to a file that is swap for a while, and faults that read it back."""
    file = Path("/var/tmp/mthp-measure-swap")
    file.unlink(missing_ok=True)
    try:
        fd = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        os.write(fd, bytes(2 * size))
        os.close(fd)
        for command in ("mkswap", "swapon"):
            subprocess.run([command, file], check=True, capture_output=True)
        memory = Memory(size, huge=False)
        memory.touch(PAGE)
        out = timed(lambda: memory.advise(MADV_PAGEOUT), time.perf_counter)
        back = timed(lambda: memory.touch(PAGE), time.perf_counter)
        subprocess.run(["swapoff", file], check=True)
    finally:
        file.unlink(missing_ok=True)
    pages = size // PAGE
    return {
        "swap_out": (out / pages, "MADV_PAGEOUT to a swap file"),
        "swap_in": (back / pages, "faults on what was paged out, with the kernel's readahead"),
    }


def compaction(known: Measured, size: int = 1 << 30) -> Measured:
    """compact_memory after every second page of 1 GiB was freed, and once more when nothing is left to move."""

    def counters() -> dict[str, int]:
        return {name: int(value) for name, value in map(str.split, Path("/proc/vmstat").read_text().splitlines())}

    def compact() -> tuple[float, dict[str, int]]:
        before = counters()
        seconds = timed(lambda: Path("/proc/sys/vm/compact_memory").write_text("1"))
        after = counters()
        return seconds, {name: after[name] - before[name] for name in after if name in before}

    memory = Memory(size, huge=False)
    memory.touch(PAGE)
    for start in range(0, size, 2 * PAGE):
        memory.advise(mmap.MADV_DONTNEED, start, PAGE)
    seconds, moved = compact()
    again, looked = compact()
    scanned = "compact_migrate_scanned", "compact_free_scanned"
    frame = again / max(sum(looked[name] for name in scanned), 1)
    spent = seconds - frame * sum(moved[name] for name in scanned)
    folio = spent / max(moved["pgmigrate_success"], 1) - known["copy_byte"][0] * PAGE
    return {
        "compact_frame": (frame, "compact_memory with nothing to move, by frames scanned"),
        "migrate_folio": (max(folio, 0), "compact_memory after every second page was freed, less scanning and copying"),
    }


def measured() -> tuple[Measured, dict[str, str]]:
    """Return all that can be measured, and why the rest cannot."""
    found: Measured = {}
    missing: dict[str, str] = {}
    parts: list[Callable[[], Measured]] = [
        calls,
        faults,
        ageing,
        lambda: large_faults(found),
        lambda: copies(found),
        scans,
        splits,
        swapping,
        lambda: compaction(found),
    ]
    names = ("calls", "faults", "ageing", "large_faults", "copies", "scans", "splits", "swapping", "compaction")
    for name, part in zip(names, parts, strict=True):
        try:
            found |= part()
        except (OSError, subprocess.CalledProcessError, KeyError, StopIteration) as error:
            missing[name] = str(error) or type(error).__name__
    return found, missing


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toml", action="store_true", help="print lines for a scenario")
    options = parser.parse_args()
    # So that a switch is put back when this is ended from outside, too.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    found, missing = measured()
    default = Costs()
    for field in dataclasses.fields(Costs):
        usual = getattr(default, field.name)
        seconds, how = found.get(field.name, (usual / 1e12, "not measured: the default"))
        value = seconds * 1e12
        if options.toml:
            print(f"{field.name} = {round(value)}  # {how}")
        else:
            print(f"{field.name:15} {value / 1000:12.3f} ns  (default {usual / 1000:.3f})  {how}")
    for name, why in missing.items():
        print(f"# {name} could not be measured: {why}")


if __name__ == "__main__":
    main()
