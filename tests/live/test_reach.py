"""A collapse reaches the predicted coverage: with plenty of memory, in a cgroup, and in fragmented memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import mmap
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from e2e.helpers import Actor, mthp_here, mthp_json_here
from memory_cgroups import memory_cgroup
from mthp.budget import Amount
from mthp.engine.collapse import carry_out
from mthp.engine.planning import plan_space
from mthp.engine.reached import reach_of
from mthp.engine.select import PlanOptions
from mthp.engine.space_plan import SpacePlan
from mthp.engine.trim import TrimOptions, trim_space
from mthp.freememory import FreeMemory
from mthp.linux.live import LiveAddressSpace
from mthp.linux.memorylimits import parse_meminfo
from mthp.linux.process import Process
from mthp.means import Means
from mthp.measuring import measure
from mthp.ptes import Block, PteColumns
from mthp.results import BlockOutcome, ScanResult
from targets import MADV_HUGEPAGE, PAGE_SIZE, PMD_ORDER, PMD_SIZE
from thp_switches import ThpSwitches

pytestmark = [
    pytest.mark.usefixtures("no_sizes"),
    pytest.mark.live,
    pytest.mark.requires("root", "thp", "mthp", "4k-pages"),
]

MIB = 1 << 20
PMD = ("--orders", f"order={PMD_ORDER}")
POINTS = 0.05
RANGES = 32
MEANS = Means(max_bloat=None, reserve=Amount(size=0))
PMD_PLAN = PlanOptions(orders=[PMD_ORDER])
SMALL_MACHINE = 4 << 30
"""A machine with at most this many bytes counts as a guest of the kernel lab, so its memory may be fragmented."""

STATES = int(os.environ.get("MTHP_TEST_REACH_STATES", "3"))
"""Fragmented states; docs/prediction.md has 50."""

LEFT_BY_BALLAST = 600 * MIB
"""Bytes that may be fragmented: with more a state takes minutes on an emulated processor."""

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Parameters of mallopt(3), from malloc.h."""

HOG = """
import array, ctypes, fcntl, mmap, os, random, sys
seed, size, cushion, pinned, holes, run = map(int, sys.argv[1:7])
spread, page = float(sys.argv[7]), mmap.PAGESIZE
libc, chance = ctypes.CDLL(None), random.Random(seed)
memory = mmap.mmap(-1, size + cushion, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
def advise(start, size, advice):
    assert libc.madvise(ctypes.c_void_p(base + start), ctypes.c_size_t(size), advice) == 0
nohugepage, populate_write, dontneed = 15, 23, 4
advise(0, size + cushion, nohugepage)
advise(0, size + cushion, populate_write)
runs = array.array("L", range(0, int(size // page * spread) - run, run))
chance.shuffle(runs)
pipes = []
def free(count):
    for _ in range(min(count // run, len(runs))):
        advise(runs.pop() * page, run * page, dontneed)
# Pages of the kernel take the place of some of the program's, while few large blocks are free that it would prefer.
free(pinned)
while pinned > 0:
    pipes.append(os.pipe())
    fcntl.fcntl(pipes[-1][1], fcntl.F_SETPIPE_SZ, 64 * page)
    pinned -= os.write(pipes[-1][1], bytes(64 * page)) // page
advise(size, cushion, dontneed)
free(holes)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def target() -> Iterator[Actor]:
    with Actor() as actor:
        yield actor


def predicted(pid: int) -> dict[str, Any]:
    reach = mthp_json_here("plan", pid, *PMD, "--reachable")["reach"]
    assert isinstance(reach, dict)
    return reach


def reached(pid: int) -> float:
    """Collapse as much as possible, and return the coverage."""
    done = mthp_here("collapse", pid, *PMD, "--max-bloat", "none", "--json")
    assert done.returncode in (0, 1), done.stderr
    return float(json.loads(done.stdout)["coverage"])


def test_where_memory_is_plenty_all_of_a_plan_is_in_reach(target: Actor) -> None:
    target.fill(target.map(RANGES * PMD_SIZE), RANGES * PMD_SIZE // PAGE_SIZE)
    now = predicted(target.pid)["now"]
    if not now["limited_by"].startswith("nothing"):
        pytest.skip(f"this machine has no {RANGES} free folios: {now['limited_by']}")
    assert now["bytes"] >= RANGES * PMD_SIZE
    assert reached(target.pid) == pytest.approx(now["coverage"], abs=POINTS)


def test_the_room_of_a_cgroup_limits_what_is_in_reach(target: Actor) -> None:
    reserve, room = 64 * MIB, 12 * MIB
    with contextlib.ExitStack() as stack:
        group = stack.enter_context(memory_cgroup())
        stack.callback(target.kill)
        group.enter(target.pid)
        # Each range grows by half of a folio.
        target.fill(target.map(RANGES * PMD_SIZE), RANGES * PMD_SIZE // PAGE_SIZE // 2, 2)
        group.limit(group.used + reserve + room)
        reach = predicted(target.pid)
        assert str(group.directory) in reach["now"]["limited_by"]
        assert 0 < reach["now"]["bytes"] < RANGES * PMD_SIZE // 2
        assert reached(target.pid) == pytest.approx(reach["now"]["coverage"], abs=POINTS)


@pytest.fixture
def small_machine() -> Iterator[None]:
    """Have a machine with little memory, and without swap or file cache: reclaim is not predicted."""
    if meminfo("MemTotal") > SMALL_MACHINE:
        pytest.skip("fragments the memory of the whole machine: only in a guest")
    libc = ctypes.CDLL(None)
    # Otherwise this process returns memory, and takes it again from a block that compaction has just made free.
    for parameter, value in ((M_TRIM_THRESHOLD, 1 << 30), (M_MMAP_MAX, 0), (M_ARENA_MAX, 1)):
        assert libc.mallopt(parameter, value) == 1
    swaps = [line.split()[0].encode() for line in Path("/proc/swaps").read_text().splitlines()[1:]]
    for swap in swaps:
        assert libc.swapoff(swap) == 0
    # It works on its own when folios are rare: only while nothing else runs, then.
    for process in background_threads():
        if (process / "comm").read_text().startswith("kcompactd"):
            os.sched_setscheduler(int(process.name), os.SCHED_IDLE, os.sched_param(0))
    ballast, kept = Path("/proc/sys/vm/nr_hugepages"), Path("/proc/sys/vm/min_free_kbytes")
    lists = Path("/proc/sys/vm/percpu_pagelist_high_fraction")
    before = kept.read_text()
    try:
        # The lists of one processor may hold as much as the low watermark, which is out of proportion to this memory.
        lists.write_text("1000000")
        ballast.write_text(str(max(0, meminfo("MemFree") - LEFT_BY_BALLAST) // PMD_SIZE))
        rehearse()
        yield
    finally:
        ballast.write_text("0")
        lists.write_text("0")
        kept.write_text(before)
        for swap in swaps:
            libc.swapon(swap, 0)


def meminfo(name: str) -> int:
    return parse_meminfo(Path("/proc/meminfo").read_text(), name) or 0


class OnlyFree(LiveAddressSpace):
    """A space that is collapsed only while a block is free.

    An allocation that finds none compacts by itself, and wakes kcompactd. Neither is predicted.

    Attributes:
        goes_on: whether other blocks are tried after one for which none was free.
    """

    goes_on, ended = False, False

    def attempt_blocks(self, blocks: Sequence[Block], means: Means, before: PteColumns) -> list[BlockOutcome]:
        outcomes = []
        for block in blocks:
            free = self.free_memory()
            assert free is not None
            zones = (FreeMemory((zone,)) for zone in free.zones)
            if not self.ended and any(zone.folios(PMD_ORDER) and zone.spare >= 1 << PMD_ORDER for zone in zones):
                outcomes += super().attempt_blocks([block], means, before)
            else:
                self.ended = not self.goes_on
                outcomes.append(BlockOutcome(*block, ScanResult.ALLOC_HUGE_PAGE_FAIL))
        return outcomes


def counted(*names: str) -> int:
    """Return the sum of the counters of /proc/vmstat with these beginnings."""
    words = Path("/proc/vmstat").read_text().split()
    return sum(int(number) for name, number in zip(words[::2], words[1::2], strict=True) if name.startswith(names))


def settle() -> None:
    """Wait until the kernel's threads neither compact nor reclaim.

    A thread that is not running may have taken pages of the target off their list (isolate_migratepages_block(),
    mm/compaction.c). Until it puts them back, a collapse of their ranges fails with PAGE_COUNT.
    """
    before = -1
    while (now := counted("compact_", "pgscan", "pgmigrate")) != before or counted("nr_isolated_") or busy():
        before = now
        time.sleep(0.5)


def busy() -> bool:
    """Return whether a thread that compacts or reclaims is at work."""
    stats = (process.joinpath("stat").read_text() for process in background_threads())
    return any(stat.rpartition(")")[2].split()[0] != "S" for stat in stats)


def background_threads() -> Iterator[Path]:
    """Yield the directory in /proc of each thread of the kernel that compacts or reclaims."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text().startswith(("kcompactd", "kswapd")):
                yield process


def flush_lists(space: LiveAddressSpace) -> None:
    """Have the pages leave the lists of processors, in which a block that was just emptied is not free yet."""
    free = space.free_memory()
    assert free is not None
    # The oldest pages leave a list first, and those that are freed next push them out.
    with mmap.mmap(-1, 2 * (free.listed + free.unlisted) * PAGE_SIZE) as memory:
        memory[::PAGE_SIZE] = bytes(len(memory) // PAGE_SIZE)


def collapsed(space: OnlyFree, plan: SpacePlan) -> float:
    """Compact memory and carry out a plan, as often as that makes folios: the coverage then."""
    space.goes_on, space.ended, made = True, False, -1
    while made:
        settle()
        Path("/proc/sys/vm/compact_memory").write_text("1")
        flush_lists(space)
        made = carry_out(space, plan, MEANS).tally(PMD_ORDER).made
    return measure(space, space.vmas()).now.share(PMD_ORDER)


@functools.cache
def rehearse() -> None:
    """Do everything once, so that this process is as large as it will be.

    Otherwise the first state has some 4 MiB less than was predicted.
    """
    with Actor() as target, OnlyFree(Process(target.pid)) as space:
        target.write(target.map(RANGES * PMD_SIZE), 20 * RANGES, PMD_SIZE // PAGE_SIZE // 20)
        plan = plan_space(space, PMD_PLAN)
        reach_of(space, plan, MEANS)
        assert collapsed(space, plan) > 0
        trim_space(space, TrimOptions())
        reach_of(space, plan_space(space, PMD_PLAN), MEANS)


@dataclass(frozen=True)
class State:
    """Fragmented memory: what lies in it, in bytes, except for numbers of ranges and pages.

    Attributes:
        kept: min_free_kbytes.
        ranges, huge: PMD ranges of the target in small pages, and in huge ones with zeroes.
        each: pages of each range that are filled.
        least, left, more: free memory while the target is filled, before, and afterwards.
        pinned: pages of the kernel.
        run: pages that become free next to each other.
        spread: share of the memory in which pages become free.
        first: whether the target is filled before the memory is fragmented.
    """

    kept: int
    ranges: int
    huge: int
    each: int
    least: int
    left: int
    more: int
    pinned: int
    run: int
    spread: float
    first: bool


def state(seed: int) -> State:
    chance = random.Random(seed)
    kept = chance.choice([4, 8, 16]) * MIB
    ranges, huge = chance.choice([32, 40, 48]), chance.choice([0, 0, 4, 8])
    each = int(PMD_SIZE // PAGE_SIZE * chance.choice([1.0, 1.0, 0.9, 0.6]))
    least, more = 2 * kept + 16 * MIB, chance.choice([0, 8, 24, 48]) * MIB
    left = least + chance.choice([8, 16, 32]) * MIB
    pinned, run, spread = (
        chance.choice([0, 0, 4000, 8000]),
        chance.choice([1, 1, 2, 8, 64]),
        chance.choice([1, 0.5, 0.3]),
    )
    return State(kept, ranges, huge, each, least, left, more, pinned, run, spread, chance.random() < 0.3)


@contextlib.contextmanager
def fragmented(target: Actor, seed: int, thp_switches: ThpSwitches) -> Iterator[subprocess.Popen[str]]:
    """Fill a target with small pages and huge ones with zeroes, among the pages of the program that is yielded."""
    of = state(seed)
    print(f"{seed=} {of}")
    address = target.map((of.huge + of.ranges) * PMD_SIZE)
    start = address + of.huge * PMD_SIZE
    if of.huge:
        thp_switches.only(f"{PMD_SIZE >> 10}kB")
        target.tell("madvise", address, of.huge * PMD_SIZE, MADV_HUGEPAGE)
        target.write(address, 20 * of.huge, PMD_SIZE // PAGE_SIZE // 20)
        thp_switches.only()
    # Each change of a switch sets it (set_recommended_min_free_kbytes(), mm/khugepaged.c).
    Path("/proc/sys/vm/min_free_kbytes").write_text(str(of.kept >> 10))

    def fill() -> None:
        for at in range(of.ranges):
            target.write(start + at * PMD_SIZE, of.each)

    if of.first:
        fill()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    size = (meminfo("MemFree") - of.left) // PAGE_SIZE * PAGE_SIZE
    holes = of.more // PAGE_SIZE + (0 if of.first else of.ranges * of.each)
    numbers = seed, size, of.left - of.least, of.pinned, holes, of.run, of.spread
    command = [sys.executable, "-S", "-c", HOG, *map(str, numbers)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hog:
        try:
            assert hog.stdout is not None
            assert hog.stdout.readline() == "ready\n"
            if not of.first:
                fill()
            settle()
            yield hog
        finally:
            hog.kill()


# Without large folios there is nothing to trim.
STAGINGS = [(seed, trim) for seed in range(STATES) for trim in (False, True) if state(seed).huge or not trim]


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "trim"), STAGINGS)
@pytest.mark.usefixtures("small_machine")
def test_what_is_predicted_of_fragmented_memory_is_reached(
    target: Actor, seed: int, trim: bool, thp_switches: ThpSwitches
) -> None:
    with fragmented(target, seed, thp_switches) as hog, OnlyFree(Process(target.pid)) as space:
        plan = plan_space(space, PMD_PLAN)
        # The first prediction makes this process larger again.
        reach = [reach_of(space, plan, MEANS) for _ in range(2)][1]
        if trim:
            trim_space(space, TrimOptions())
        carry_out(space, plan, MEANS)
        now = measure(space, space.vmas()).now.share(PMD_ORDER)
        ways = {"now": (reach.now, now), "compacted": (reach.compacted, collapsed(space, plan))}
        if trim:
            ways = {"trimmed": (reach.trimmed, ways["compacted"][1])}
        if hog.poll() is not None:
            pytest.skip("the kernel killed the program that fills memory")
        for way, (said, coverage) in ways.items():
            print(f"REACH {seed} {way} {said.coverage} {coverage} {plan.coverage_after} {said.limit}")
        for way, (said, coverage) in ways.items():
            assert said.coverage == pytest.approx(coverage, abs=POINTS), f"{way}: {said}"
