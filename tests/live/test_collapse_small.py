"""``mthp collapse --small``: memory in no whole PMD range of its mapping, on a real kernel, under attack."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from daemons import RunningDaemon
from e2e.helpers import Actor, mthp_here, mthp_json_here
from mover_targets import Controlled
from mthp.engine.collapse import collapse_space
from mthp.engine.select import PlanOptions
from mthp.errors import MthpError
from mthp.linux.live import open_live
from mthp.means import Means
from targets import PAGE_SIZE, PMD_SIZE, PROT_READ, PROT_WRITE
from waiting import FACTOR, PATIENCE, until

pytestmark = [
    pytest.mark.usefixtures("thp_switches"),
    pytest.mark.live,
    pytest.mark.requires("root", "mthp", "mover", "pagemap_scan"),
]

SECONDS = float(os.environ.get("MTHP_TEST_SECONDS", "5"))
"""How long the target that changes its mappings is worked on."""

MEANS = Means("move", max_pause=0.005 * FACTOR, pause_share=0.5, fill=True, max_bloat=None, verify=True)
SMALL = ("--mechanism", "move", "--small", "--verify", "--max-pause", f"{round(20 * FACTOR)}ms")


def orders(pid: int, start: int, pages: int) -> list[int]:
    with open_live(pid) as space:
        found: list[int] = space.read([(start, start + pages * PAGE_SIZE)]).folio_order.tolist()
        return found


def mapped_between_guards(actor: Actor, first: int, pages: int) -> int:
    """Return the address of `pages` pages with the pattern that begin `first` pages after the start of a PMD range."""
    around = -(-(first + pages + 1) * PAGE_SIZE // PMD_SIZE) * PMD_SIZE
    reserved = actor.map(around)
    actor.tell("mprotect", reserved, around, 0)
    address = reserved + first * PAGE_SIZE
    actor.tell("mprotect", address, pages * PAGE_SIZE, PROT_READ | PROT_WRITE)
    actor.fill(address, pages)
    return address


def test_a_block_of_four_pages_in_a_mapping_of_five(actor: Actor) -> None:
    """The smallest that can be: guard pages on both sides, at an address that is aligned to the block alone."""
    address = mapped_between_guards(actor, 36, 5)
    with open_live(actor.pid) as space:
        mapped = space.mapped()
        choice = PlanOptions(small=True, orders=(2,), within=(address, address + 5 * PAGE_SIZE))
        report = collapse_space(space, choice, Means("move", max_pause=0.02 * FACTOR, verify=True))
        assert space.mapped() == mapped
    assert (report.folios[2].made, report.complete) == (1, True)
    assert orders(actor.pid, address, 5) == [2, 2, 2, 2, 0]
    assert actor.damaged(address, 5) == 0
    assert report.after.out_of_reach == report.plan.before.out_of_reach


def test_the_edges_of_a_large_mapping(actor: Actor) -> None:
    """The memory before and after its whole PMD ranges; the ranges themselves are planned as usual."""
    edge, pages = 24, 24 + PMD_SIZE // PAGE_SIZE + 40
    address = mapped_between_guards(actor, PMD_SIZE // PAGE_SIZE - edge, pages)
    before = mthp_json_here("plan", actor.pid, "--orders", "16K,32K,64K,128K")
    done = mthp_here("collapse", actor.pid, "--orders", "16K,32K,64K,128K", *SMALL, "--json")
    report = json.loads(done.stdout)
    assert done.returncode in (0, 1), done.stderr
    assert report["verified"]
    assert report["plan"]["measured"]["out_of_reach_bytes"] == before["measured"]["out_of_reach_bytes"] > 0
    found = orders(actor.pid, address, pages)
    assert found[:edge] == [3] * 8 + [4] * 16
    assert found[edge:-40] == [5] * (PMD_SIZE // PAGE_SIZE)
    assert found[-40:] == [5] * 32 + [3] * 8
    assert actor.damaged(address, pages) == 0


OF_ITSELF = """
import ctypes, mmap, sys, threading
import mthp
from mthp.linux.live import open_live
page, pages = mmap.PAGESIZE, 37
around = mmap.mmap(-1, (pages + 2) * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(around)) + page
for guard in (start - page, start + pages * page):
    ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0)
memory = (ctypes.c_uint64 * (pages * page // 8)).from_address(start)
for at in range(len(memory)):
    memory[at] = at
over, wrong = threading.Event(), []
def check():
    while not over.is_set():
        wrong.extend(at for at in range(0, len(memory), 97) if memory[at] != at)
thread = threading.Thread(target=check)
thread.start()
within = (start, start + pages * page)
report = mthp.collapse_self(mechanism="move", small=True, within=within)
over.set()
thread.join()
with open_live("self") as space:
    orders = space.read([within]).folio_order
made = sum(tally.made for tally in report.folios.values())
intact = sum(memory) == sum(range(len(memory)))
print(made, len(report.plan.folios), int((orders >= 2).sum()), len(wrong), intact, report.windows.count)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.uname().machine != "x86_64", reason="a process moves its own memory on x86-64 only")
def test_a_process_collapses_small_mappings_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", OF_ITSELF], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    made, planned, pages, wrong, intact, windows = done.stdout.split()
    # No thread is stopped.
    assert (made, wrong, intact, windows) == (planned, "0", "True", "0")
    assert int(pages) >= 32


class Churning(Controlled):
    """A process of small mappings that change all the time (``programs/mover_small.c``)."""

    def __init__(self, directory: Path, threads: int) -> None:
        super().__init__(directory, "mover_small", threads)
        self.await_ready(lambda: self.word(1) == threads + 1)

    def finish(self) -> int:
        """Let it check all of its memory, and end: how it ended."""
        self.put(0, 1)
        return self.process.wait(PATIENCE)


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 4])
def test_mappings_that_come_go_split_and_join(threads: int, tmp_path: Path) -> None:
    """Nothing of the target is lost, a stack that grows is left alone, and every planned folio has an outcome."""
    made: Counter[int] = Counter()
    reasons: Counter[str] = Counter()
    with Churning(tmp_path, threads) as target:
        ends = time.monotonic() + SECONDS
        while time.monotonic() < ends or not made:
            with open_live(target.pid) as space:
                try:
                    report = collapse_space(space, PlanOptions(small=True), MEANS)
                except MthpError as error:
                    reasons[error.message] += 1
                    continue
                assert report.error is None, report.error
                for order, tally in report.folios.items():
                    made[order] += tally.made
                    reasons.update({reason: count for (_, reason), count in tally.failed.items()})
                    assert tally.planned == tally.made + tally.unchanged + tally.left
        assert set(orders(target.pid, target.word(4), target.word(5) // PAGE_SIZE)) == {0}
        assert target.process.poll() is None, "it died"
        rounds = target.word(2)
        assert (target.finish(), target.word(3)) == (0, 0), "it died, or found wrong words"
    print(f"{threads} threads, {rounds} rounds, folios made {dict(made)}, left {dict(reasons)}")
    assert sum(made.values()) > 0


def test_a_rule_with_small_moves_a_small_mapping(actor: Actor, tmp_path: Path) -> None:
    """The daemon does the same for a rule, and contents stay."""
    pages = 4 + 16 + 64
    address = mapped_between_guards(actor, 44, pages)
    rules = tmp_path / "rules.toml"
    rules.write_text(
        "[daemon]\ncpu = '100%'\n[[rule]]\nname = 'small'\n"
        f"match = {{ pid = [{actor.pid}] }}\norders = '16K,64K,256K'\nmax_ptes_none = 0\n"
        f"mechanism = 'move'\nsmall = true\nmax_pause = '{round(20 * FACTOR)}ms'\n"
    )
    with RunningDaemon(tmp_path / "run", "--config", str(rules)) as daemon:
        until(lambda: orders(actor.pid, address, pages) == [2] * 4 + [4] * 16 + [6] * 64, lambda: daemon.said)

        def status() -> dict[str, Any]:
            target = daemon.target(actor.pid)
            assert target is not None
            return target

        # The page tables show a batch before it is counted.
        until(lambda: status()["collapses"].keys() >= {"16K", "64K", "256K"}, lambda: daemon.said)
        target = status()
    assert target["pauses"]["count"] > 0
    assert target["bloat_bytes"] == 0
    assert actor.damaged(address, pages) == 0
