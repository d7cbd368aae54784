"""A collapse reaches the predicted coverage: with plenty of memory, in a cgroup, and in fragmented memory."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.helpers import Actor, mthp, mthp_json
from memory_cgroups import memory_cgroup
from mthp.budget import Amount
from mthp.engine.collapse import carry_out
from mthp.engine.planning import plan_space
from mthp.engine.reached import Reach, reach_of
from mthp.engine.select import PlanOptions
from mthp.engine.space_plan import SpacePlan
from mthp.linux.headroom import parse_meminfo
from mthp.linux.live import LiveAddressSpace, open_live
from mthp.means import Means
from mthp.measuring import measure
from targets import PAGE_SIZE, PMD_ORDER, PMD_SIZE
from thp_switches import ThpSwitches

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "thp", "mthp", "4k-pages")]

MIB = 1 << 20
PMD = ("--orders", f"order={PMD_ORDER}")
POINTS = 0.05
RANGES = 32
MEANS = Means(max_bloat=None, reserve=Amount(size=0))
SMALL_MACHINE = 4 << 30
"""A machine with at most this many bytes counts as a guest of the kernel lab, so its memory may be fragmented."""

HOG = """
import mmap, sys
size, holes = map(int, sys.argv[1:])
memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(15)
for at in range(0, size, mmap.PAGESIZE):
    memory[at] = 1
for at in range(0, holes, 2 * mmap.PAGESIZE):
    memory.madvise(4, at, mmap.PAGESIZE)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def faults_of_one_page(thp_switches: ThpSwitches) -> None:
    thp_switches.set("enabled", "madvise")
    thp_switches.only()


@pytest.fixture
def target() -> Iterator[Actor]:
    with Actor() as actor:
        yield actor


def predicted(pid: int) -> dict[str, Any]:
    reach = mthp_json("plan", pid, *PMD, "--reachable")["reach"]
    assert isinstance(reach, dict)
    return reach


def reached(pid: int) -> float:
    """Collapse as much as possible, and return the coverage."""
    done = mthp("collapse", pid, *PMD, "--max-bloat", "none", "--json")
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


@contextlib.contextmanager
def fragmented(left: int, holes: int) -> Iterator[None]:
    """Leave `left` bytes free, and half of `holes` more in single pages."""
    meminfo = Path("/proc/meminfo").read_text()
    total, free = (parse_meminfo(meminfo, name) or 0 for name in ("MemTotal", "MemFree"))
    if total > SMALL_MACHINE:
        pytest.skip("fragments the memory of the whole machine: only in a guest")
    Path("/proc/sys/vm/drop_caches").write_text("3")
    command = [sys.executable, "-c", HOG, str(free - left), str(holes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hog:
        try:
            assert hog.stdout is not None
            assert hog.stdout.readline() == "ready\n"
            yield
        finally:
            hog.kill()


STATES = [(48 * MIB, 16 * MIB), (64 * MIB, 0)]
"""Bytes left free as they are, and bytes free in single pages beside those that the target takes."""


@contextlib.contextmanager
def planned(target: Actor, address: int, state: tuple[int, int]) -> Iterator[tuple[LiveAddressSpace, SpacePlan, Reach]]:
    """Fragment memory, and have a target take its pages there one by one.

    All in this process, as another one would take of what is left.
    """
    left, more = state
    size = RANGES * PMD_SIZE
    with open_live(target.pid) as space, fragmented(left, 2 * (size + more)):
        target.fill(address, size // PAGE_SIZE)
        plan = plan_space(space, PlanOptions(orders=[PMD_ORDER]))
        reach = reach_of(space, plan, MEANS)
        print(space.free_memory(), plan.folios_by_order, reach)
        yield space, plan, reach


def covered(space: LiveAddressSpace) -> float:
    return measure(space, space.vmas()).now.share(PMD_ORDER)


@pytest.mark.slow
@pytest.mark.parametrize("state", STATES)
def test_a_collapse_reaches_no_more_than_compaction_allows(target: Actor, state: tuple[int, int]) -> None:
    """It is an upper bound here: compaction stops before all is compacted."""
    with planned(target, target.map(RANGES * PMD_SIZE), state) as (space, plan, reach):
        carry_out(space, plan, MEANS)
        print(covered(space))
        assert reach.now.coverage is not None
        assert reach.compacted.coverage is not None
        assert reach.now.coverage - POINTS <= covered(space) <= reach.compacted.coverage + POINTS
