"""``mthp collapse`` below the PMD size where something is in the way: little memory, no rights, another program."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from e2e.helpers import MTHP, Actor, mthp, mthp_json
from memory_cgroups import memory_cgroup
from mover_targets import Writers, mappings
from mthp.linux.live import open_live
from targets import PAGE_SIZE, PMD_SIZE
from thp_switches import ThpSwitches
from waiting import FACTOR, PATIENCE, until

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "mthp", "4k-pages", "pagemap_scan")]

PAGES = PMD_SIZE // PAGE_SIZE
OPTIONS = ("--orders", "64K", "--max-ptes-none", "0", "--mechanism", "move")


@pytest.fixture(autouse=True)
def faults_of_one_page(thp_switches: ThpSwitches) -> None:
    thp_switches.set("enabled", "madvise")
    thp_switches.only("2048kB", word="inherit")


@pytest.fixture
def actor() -> Iterator[Actor]:
    with Actor() as actor:
        yield actor


def folios(pid: int, start: int, size: int) -> dict[int, int]:
    """Pages by the order of the folio that they lie in."""
    with open_live(pid) as space:
        return dict(Counter(space.read([(start, start + size)]).folio_order.tolist()))


def reasons(report: dict[str, Any]) -> set[str]:
    return {each["reason"] for tally in report["folios"].values() for each in tally["reasons"]}


def test_little_memory_left_in_its_cgroup(actor: Actor) -> None:
    """A refill that is over the limit would end the target, so it is not begun."""
    with memory_cgroup() as cgroup:
        cgroup.enter(actor.pid)
        cgroup.limit(40 << 20)
        address = actor.map(4 * PMD_SIZE)
        actor.fill(address, 4 * PAGES)
        report = mthp_json("collapse", actor.pid, *OPTIONS, code=1)
        assert f"of 40M are left in {cgroup.directory}" in report["room"]
        assert report["folios"]["4"]["made"] == 0
        assert report["folios"]["4"]["over_reserve"] >= 128
        assert folios(actor.pid, address, 4 * PMD_SIZE) == {0: 4 * PAGES}
        assert actor.damaged(address, 4 * PAGES) == 0
        cgroup.limit(1 << 30)
        report = json.loads(mthp("collapse", actor.pid, *OPTIONS, "--json").stdout)
        assert report["folios"]["4"]["made"] >= 128
        assert actor.damaged(address, 4 * PAGES) == 0
        actor.kill()


def test_a_process_without_rights_needs_none() -> None:
    """Its userfaultfd sees faults of user mode only, which vm.unprivileged_userfaultfd does not forbid."""
    with Actor(as_nobody=True) as actor:
        address = actor.map(PMD_SIZE)
        actor.fill(address, PAGES)
        report = json.loads(mthp("collapse", actor.pid, *OPTIONS, "--verify", "--json").stdout)
        assert report["folios"]["4"]["made"] >= 32
        assert folios(actor.pid, address, PMD_SIZE) == {4: PAGES}
        assert actor.damaged(address, PAGES) == 0


def test_a_target_that_is_stopped_stays_so(tmp_path: Path) -> None:
    with Writers(tmp_path, 3, 4) as target:
        target.signal(signal.SIGSTOP)
        until(lambda: target.state() == "T", "it is stopped")
        report = mthp_json("collapse", target.pid, *OPTIONS, "--max-pause", f"{round(20 * FACTOR)}ms")
        assert report["folios"]["4"]["made"] >= 64
        until(lambda: target.state() == "T", "it is stopped again")
        before = target.rounds()
        time.sleep(0.05)
        assert target.rounds() == before
        target.signal(signal.SIGCONT)
        assert target.progresses()
        assert target.finish() == 0


IO_URING = """
import ctypes, mmap, time
memory = mmap.mmap(-1, 4 << 20, flags=0x22)
memory.write(b"x" * (4 << 20))
libc = ctypes.CDLL(None, use_errno=True)
print(libc.syscall(425, 4, ctypes.create_string_buffer(120)), flush=True)
time.sleep(600)
"""


def test_a_target_with_an_io_uring_is_refused() -> None:
    with subprocess.Popen([sys.executable, "-c", IO_URING], stdout=subprocess.PIPE, text=True) as target:
        assert target.stdout is not None
        try:
            if int(target.stdout.readline()) < 0:
                pytest.skip("needs io_uring")
            before = mappings(target.pid)
            report = mthp_json("collapse", target.pid, *OPTIONS, code=1)
            assert any("io_uring" in reason for reason in reasons(report))
            assert report["pauses"]["count"] == 0
            assert mappings(target.pid) == before
        finally:
            target.kill()


BECOMES_ANOTHER = """
import mmap, os, sys
memory = mmap.mmap(-1, 32 << 20, flags=0x22)
memory.write(b"x" * (32 << 20))
print("ready", flush=True)
sys.stdin.readline()
code = "print('again', flush=True); input()"
os.execv(sys.executable, [sys.executable, "-c", code])
"""


def test_a_target_that_becomes_another_program_in_the_middle() -> None:
    arguments = [sys.executable, "-c", BECOMES_ANOTHER]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as target:
        assert target.stdin is not None
        assert target.stdout is not None
        assert target.stdout.readline() == "ready\n"
        command = [*MTHP, "collapse", str(target.pid), *OPTIONS, "--rate", "8M", "--json"]
        running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        # More than one batch, so that one has been checked.
        until(lambda: moved_pages(target.pid) >= 40 * 16, "something is moved")
        target.stdin.write("\n")
        target.stdin.flush()
        assert target.stdout.readline() == "again\n"
        out, err = running.communicate(timeout=PATIENCE)
        assert "Traceback" not in err
        report = json.loads(out)
        assert running.returncode in (1, 4)
        assert report["folios"]["4"]["made"] > 0
        assert target.poll() is None
        target.stdin.write("\n")
        target.stdin.flush()
        assert target.wait(PATIENCE) == 0


def moved_pages(pid: int) -> int:
    """Pages in folios of 64 KiB of the large mappings of a process."""
    with open_live(pid) as space:
        segments = [(vma.start, vma.end) for vma in space.vmas() if vma.size >= 16 << 20 and vma.permissions == "rw-p"]
        return int((space.read(segments).folio_order == 4).sum())
