"""Folios made in place while their process, mthp or the machine interferes, between two steps or all the time."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from memory_cgroups import memory_cgroup
from mthp.linux.live import LiveAddressSpace, open_live
from mthp.linux.process import Process
from mthp.linux.split.blocks import SplitBlocks
from mthp.linux.split.file import SPLIT_FILE, SplitFile
from mthp.linux.sysfs import ThpSysfs
from mthp.ptes import Block, Pte
from mthp.results import BlockOutcome, ScanResult
from split_ranges import ABILITY, PAGES, SPLIT, SPLITS, Target, memory_of, random_blocks, resident_of, runs_of
from split_targets import Churn
from targets import PAGE_SIZE, PMD_ORDER, PMD_SIZE, Puppet
from thp_switches import ThpSwitches, size_name
from waiting import PATIENCE, until

CHURN_SECONDS = float(os.environ.get("MTHP_TEST_CHURN_SECONDS", "10"))

pytestmark = [*SPLITS, pytest.mark.usefixtures("no_sizes")]


# --- what happens between the collapse and a split -------------------------------------------------------------------


class Staged(SplitFile):
    """The system's file. A callback runs before its n-th write."""

    def __init__(self, stage: Callable[[], object], at: int = 0, refuses: bool = False) -> None:
        super().__init__()
        self._stage, self.at, self._refuses, self.writes = stage, at, refuses, 0

    def split(self, pid: int, address: int, page_size: int, order: int, at: int | None = None) -> int:
        if self.writes == self.at:
            self._stage()
        self.writes += 1
        if self._refuses and self.writes > self.at:
            return 1
        return super().split(pid, address, page_size, order, at)


def staged(space: LiveAddressSpace, file: SplitFile, blocks: list[Block]) -> list[BlockOutcome]:
    space._splitter = SplitBlocks(space, ABILITY, file)
    outcomes = space.collapse_blocks(blocks, SPLIT)
    if isinstance(file, Staged):
        assert file.writes > file.at, "what was to be staged did not happen: too few writes"
    return outcomes


def of_several_orders(puppet: Puppet, seed: int) -> Target:
    """A target with a layout that takes more than one write."""
    rng = random.Random(seed)
    while True:
        target = Target(puppet, puppet.map(PMD_SIZE), rng)
        # One write splits one half of the folio around a page, or both into equal parts.
        small = [block for block in target.blocks if block[1] < PMD_ORDER - 1]
        halves = {(address - target.address) // (PMD_SIZE // 2) for address, _ in small}
        if len(halves) == 2 and len({order for _, order in target.blocks}) > 1:
            return target


@pytest.fixture(params=[0, 1], ids=["before-the-first-split", "before-the-second"])
def step(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


def test_a_fork_between_the_steps(puppet: Puppet, step: int) -> None:
    target = of_several_orders(puppet, 8)
    with open_live(puppet.pid) as space:
        outcomes = staged(space, Staged(lambda: puppet.tell("fork"), step), target.blocks)
        target.check(space, outcomes)


def test_a_pin_between_the_steps_is_told_as_bloat(puppet: Puppet, step: int) -> None:
    target = Target(puppet, puppet.map(PMD_SIZE), random.Random(9), blocks=[])
    target.blocks = [(target.address + int(target.present.argmax()) // 16 * 16 * PAGE_SIZE, 4)]
    held = int(np.flatnonzero(target.present)[0])
    where = target.address + held * PAGE_SIZE
    with open_live(puppet.pid) as space:
        outcomes = staged(space, Staged(lambda: puppet.tell("pin", where, PAGE_SIZE), step), target.blocks)
        assert (target.contents() == target.bytes).all()
        resident = resident_of(puppet.pid, target.address) // PAGE_SIZE
        orders = target.orders(space)
        # The resident memory is that of the blocks and the fill that is reported to remain.
        left = sum(outcome.left_filled for outcome in outcomes)
        kept = sum(1 for outcome in outcomes if outcome.result is not ScanResult.SUCCEED)
        assert resident == int((orders >= 0).sum())
        spare = int((~target.present & (target.planned < 0) & (orders >= 0)).sum())
        assert left == spare
        if step == 0:
            assert left == int((~target.present & (target.planned < 0)).sum())
            assert orders.max() == PMD_ORDER
            assert any("pinned" in outcome.reason for outcome in outcomes)
            assert not kept  # all lie in one larger folio


def test_memory_unmapped_between_the_steps(puppet: Puppet, step: int) -> None:
    target = of_several_orders(puppet, 10)
    half = PMD_SIZE // 2
    with open_live(puppet.pid) as space:
        staged(space, Staged(lambda: puppet.tell("munmap", target.address, half), step), target.blocks)
        orders = target.orders(space)
        assert (orders[: PAGES // 2] == -1).all()
        assert runs_of(orders[PAGES // 2 :] >= 0) == runs_of(target.planned[PAGES // 2 :] >= 0)
        with memory_of(puppet.pid) as memory:
            data = os.pread(memory, half, target.address + half)
        assert data == target.bytes[PAGES // 2 :].tobytes()


def test_memory_locked_between_the_steps_keeps_what_was_filled_and_it_is_told(puppet: Puppet, step: int) -> None:
    target = of_several_orders(puppet, 11)
    with open_live(puppet.pid) as space:
        file = Staged(lambda: puppet.tell("mlock", target.address, PMD_SIZE, 0), step)
        outcomes = staged(space, file, target.blocks)
        left = sum(outcome.left_filled for outcome in outcomes)
        assert left == int(((target.planned < 0) & (target.orders(space) >= 0)).sum())
        assert left == int((target.planned < 0).sum()) or step
        assert (target.contents() == target.bytes).all()
        assert {outcome.result for outcome in outcomes} == {ScanResult.SUCCEED}


def test_a_target_at_its_memory_limit_between_the_steps(step: int) -> None:
    """Splits charge nothing."""
    with memory_cgroup() as cgroup, Puppet() as puppet:
        cgroup.enter(puppet.pid)
        target = of_several_orders(puppet, 15)
        with open_live(puppet.pid) as space:
            outcomes = staged(space, Staged(lambda: cgroup.limit(cgroup.used), step), target.blocks)
            target.check(space, outcomes)


@pytest.mark.parametrize("left", [0, PMD_SIZE // 2, PMD_SIZE - PAGE_SIZE], ids=["none", "half", "all-but-a-page"])
def test_a_memory_limit_that_is_hit_inside_the_collapse(left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit falls after mthp has read it, so that the kernel's charge of the new folio fails."""
    with memory_cgroup() as cgroup, Puppet() as puppet:
        cgroup.forbid_swap()
        cgroup.enter(puppet.pid)
        targets = [Target(puppet, puppet.map(PMD_SIZE), random.Random(seed)) for seed in (16, 17)]
        plain = Process.advise

        def advise(self: Process, address: int, size: int, advice: int) -> int:
            cgroup.limit(cgroup.used + left)
            return plain(self, address, size, advice)

        with open_live(puppet.pid) as space:
            before = [runs_of(target.orders(space)) for target in targets]
            monkeypatch.setattr(Process, "advise", advise)
            outcomes = space.collapse_blocks([block for target in targets for block in target.blocks], SPLIT)
            monkeypatch.undo()
            cgroup.limit(1 << 30)
            for target, was in zip(targets, before, strict=True):
                own = [outcome for outcome in outcomes if target.address <= outcome.address < target.address + PMD_SIZE]
                if left and any(outcome.result is ScanResult.SUCCEED for outcome in own):
                    # The kernel took back page cache of the group, and had room.
                    target.check(space, own)
                    continue
                assert {outcome.result for outcome in own} <= {
                    ScanResult.CGROUP_CHARGE_FAIL,
                    ScanResult.ALLOC_HUGE_PAGE_FAIL,
                }, own
                assert all(outcome.everywhere and not outcome.left_filled for outcome in own)
                assert runs_of(target.orders(space)) == was
                assert (target.contents() == target.bytes).all()
                # And with room again it is made.
                target.check(space, space.collapse_blocks(target.blocks, SPLIT))


def test_a_target_that_exits_between_the_steps(puppet: Puppet, step: int) -> None:
    target = of_several_orders(puppet, 12)
    other = of_several_orders(puppet, 12)
    with open_live(puppet.pid) as space:
        outcomes = staged(space, Staged(puppet.kill, step), target.blocks + other.blocks)
        assert {outcome.result for outcome in outcomes} == {ScanResult.ANY_PROCESS}


def test_where_the_file_refuses_in_the_middle_the_fill_goes_back_by_madv_cold(puppet: Puppet, step: int) -> None:
    target = of_several_orders(puppet, 13)
    with open_live(puppet.pid) as space:
        outcomes = staged(space, Staged(lambda: None, step, refuses=True), target.blocks)
        assert (target.contents() == target.bytes).all()
        orders = target.orders(space)
        assert not (~target.present & (target.planned < 0) & (orders >= 0)).any()
        assert not any(outcome.left_filled for outcome in outcomes)
        if step == 0:
            assert orders.max() == 0
            assert {outcome.result for outcome in outcomes} == {ScanResult.PAGE_COUNT}


def test_where_debugfs_is_unmounted_meanwhile_the_remedy_is_told_and_nothing_is_done(puppet: Puppet) -> None:
    target = Target(puppet, puppet.map(PMD_SIZE), random.Random(18))
    script = f"""
import subprocess
from mthp.errors import NotPermittedError
from mthp.linux.live import open_live
from mthp.means import Means
with open_live({puppet.pid}) as space:
    assert space.splits()
    subprocess.run(["umount", "-l", "/sys/kernel/debug"], check=True)
    try:
        space.collapse_blocks({target.blocks!r}, Means("split"))
    except NotPermittedError as error:
        print(error.help)
"""
    with open_live(puppet.pid) as space:
        before = runs_of(target.orders(space))
        ended = subprocess.run(
            ["unshare", "--mount", sys.executable, "-c", script], check=True, capture_output=True, text=True
        )
        assert "mount -t debugfs" in ended.stdout
        assert runs_of(target.orders(space)) == before


def test_where_debugfs_is_unmounted_between_the_steps_the_open_file_still_splits(puppet: Puppet, step: int) -> None:
    target = of_several_orders(puppet, 19)
    debugfs = SPLIT_FILE.parent
    try:
        with open_live(puppet.pid) as space:
            stage = Staged(lambda: subprocess.run(["umount", "-l", debugfs], check=True), step)
            target.check(space, staged(space, stage, target.blocks))
    finally:
        subprocess.run(["mount", "-t", "debugfs", "debugfs", debugfs], check=True)


@pytest.mark.parametrize("writes", range(0, 6, 2))
def test_killed_in_the_middle_it_leaves_nothing_to_undo(puppet: Puppet, writes: int) -> None:
    target = Target(puppet, puppet.map(PMD_SIZE), random.Random(14))
    switches = {path: path.read_text() for path in Path(ThpSysfs().root).rglob("*enabled")}
    script = f"""
import os, signal, sys
from mthp.means import Means
from mthp.linux.split import file as splitfile
from mthp.linux.live import open_live
written = 0
plain = splitfile.SplitFile.split
def split(self, pid, *rest):
    global written
    if pid == {puppet.pid}:
        written += 1
        if written > {writes}:
            os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, pid, *rest)
splitfile.SplitFile.split = split
with open_live({puppet.pid}) as space:
    space.collapse_blocks({target.blocks!r}, Means("split"))
"""
    ended = subprocess.run([sys.executable, "-c", script], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (target.contents() == target.bytes).all()
    status = Path(f"/proc/{puppet.pid}/status").read_text()
    assert "TracerPid:\t0\n" in status
    assert "\nState:\tS" in status
    assert {path: path.read_text() for path in Path(ThpSysfs().root).rglob("*enabled")} == switches
    # Another run makes the planned folios of the memory that it finds.
    with open_live(puppet.pid) as space:
        space.collapse_blocks(target.blocks, SPLIT)
        assert (target.contents() == target.bytes).all()


def test_two_at_once_lose_no_bytes(puppet: Puppet) -> None:
    targets = [Target(puppet, puppet.map(PMD_SIZE), random.Random(20 + n)) for n in range(6)]
    blocks = [block for target in targets for block in target.blocks]
    script = f"""
from mthp.means import Means
from mthp.linux.live import open_live
with open_live({puppet.pid}) as space:
    space.collapse_blocks({blocks!r}, Means("split"))
"""
    running = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    for target in targets:
        assert (target.contents() == target.bytes).all()


COMPACT = Path("/proc/sys/vm/compact_memory")


@pytest.mark.skipif(not COMPACT.exists(), reason="needs a kernel that compacts memory on demand")
def test_compaction_all_the_time_leaves_no_fill_that_is_not_told(puppet: Puppet) -> None:
    """Compaction moves folios to other frames between two steps, and splits those without room."""
    over = threading.Event()

    def compact() -> None:
        while not over.is_set():
            COMPACT.write_text("1")

    compacting = threading.Thread(target=compact)
    compacting.start()
    try:
        with open_live(puppet.pid) as space:
            for seed in range(10):
                target = Target(puppet, puppet.map(PMD_SIZE), random.Random(30 + seed))
                outcomes = space.collapse_blocks(target.blocks, SPLIT)
                assert (target.contents() == target.bytes).all()
                spare = ~target.present & (target.planned < 0) & (target.orders(space) >= 0)
                assert int(spare.sum()) <= sum(outcome.left_filled for outcome in outcomes)
                puppet.tell("munmap", target.address, PMD_SIZE)
    finally:
        over.set()
        compacting.join()


@pytest.mark.parametrize("flags", ["-", "d", "u", "f", "z"])
def test_threads_lose_nothing_while_their_memory_is_made_again_and_again(flags: str) -> None:
    made, results = made_beside_threads(flags, CHURN_SECONDS)
    # Memory that is discarded all the time may be gone when its folio is made.
    assert made or (results and flags in ("d", "u")), results


def test_khugepaged_works_on_the_same_memory(thp_switches: ThpSwitches) -> None:
    for name, word in (
        # Not 0, because on one processor khugepaged would then leave no time to other programs.
        ("scan_sleep_millisecs", "10"),
        ("alloc_sleep_millisecs", "0"),
        ("pages_to_scan", str(8 * PAGES)),
    ):
        thp_switches.set(f"khugepaged/{name}", word)
    thp_switches.set("enabled", "always")
    thp_switches.only(size_name(PMD_ORDER), word="inherit")
    scans = ThpSysfs().root / "khugepaged/full_scans"
    before = int(scans.read_text())
    # It may make huge pages of all before a block is made here; what counts is that no thread finds a wrong byte.
    made, results = made_beside_threads("-", CHURN_SECONDS)
    assert made or results
    until(lambda: int(scans.read_text()) > before, "a full scan")


def made_beside_threads(flags: str, seconds: float) -> tuple[int, Counter[str]]:
    """Make random folios of memory that threads use; return the number made, and the outcomes of the others."""
    rng = random.Random(3)
    made = 0
    results: Counter[str] = Counter()
    with Churn(3, max(8, 2 * PMD_SIZE >> 20), 40, flags) as churn, open_live(churn.pid) as space:
        end = time.monotonic() + seconds
        while time.monotonic() < end or (not (made or results) and time.monotonic() < end + PATIENCE):
            address = churn.address + rng.randrange(churn.size // PMD_SIZE) * PMD_SIZE
            columns = space.read([(address, address + PMD_SIZE)])
            present = columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO)
            if present.any():
                outcomes = space.collapse_blocks(random_blocks(address, rng, present), SPLIT)
                refused = [outcome for outcome in outcomes if outcome.result is not ScanResult.SUCCEED]
                made += len(outcomes) - len(refused)
                results.update(f"{each.result.name} {each.reason}".strip() for each in refused)
        wrong = churn.finish()
    print(f"{flags}: {made} folios made in {seconds:.0f} s beside 3 threads; {churn.accesses} accesses, {wrong} wrong;")
    print(f"not made: {dict(results) or 'none'}")
    assert not wrong
    assert churn.accesses
    return made, results
