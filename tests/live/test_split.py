"""Folios made in place: random layouts in other processes, and what happens when these interfere between two steps.

Where debugfs is closed, as under kernel lockdown, the tests are skipped; the lab's guests run them.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import mthp as library
from memory_cgroups import memory_cgroup
from mthp.linux.live import LiveAddressSpace, open_live
from mthp.linux.split import SplitBlocks
from mthp.linux.splitfile import SplitFile, split_ability
from mthp.linux.sysfs import ThpSysfs
from mthp.means import Means
from mthp.ptes import Block, Pte
from mthp.results import BlockOutcome, ScanResult
from split_targets import Churn
from targets import (
    MADV_GUARD_INSTALL,
    MADV_NOHUGEPAGE,
    PAGE_SIZE,
    PMD_ORDER,
    PMD_SIZE,
    PROT_READ,
    Puppet,
)
from thp_switches import ThpSwitches

LAYOUTS = int(os.environ.get("MTHP_TEST_LAYOUTS", "40"))
CHURN_SECONDS = float(os.environ.get("MTHP_TEST_CHURN_SECONDS", "10"))
SPLIT = Means("split")
PAGES = PMD_SIZE // PAGE_SIZE
ABILITY = split_ability(ThpSysfs().geometry()) if ThpSysfs().exists else None

pytestmark = [
    pytest.mark.live,
    pytest.mark.requires("root", "thp"),
    pytest.mark.skipif(
        ABILITY is None or not ABILITY.splits,
        reason="no THP" if ABILITY is None else ": ".join(ABILITY.why_no_split()),
    ),
]


@pytest.fixture(autouse=True)
def faults_of_one_page(thp_switches: ThpSwitches) -> None:
    thp_switches.set("enabled", "madvise")
    thp_switches.only()


@pytest.fixture
def puppet() -> Iterator[Puppet]:
    with Puppet() as puppet:
        yield puppet


class Target:
    """A PMD range of a puppet with random contents, and what is to become of it."""

    def __init__(self, puppet: Puppet, address: int, rng: random.Random, blocks: list[Block] | None = None) -> None:
        self.puppet, self.address = puppet, address
        self.present = np.zeros(PAGES, np.bool_)
        # Stretches that are used and stretches that are not, as real heaps have them.
        for _ in range(rng.randint(1, 12)):
            at, length = rng.randrange(PAGES), rng.choice((1, 3, 16, 40, 200))
            self.present[at : at + length] = True
        self.blocks = _random_blocks(address, rng, self.present) if blocks is None else blocks
        self.bytes = np.zeros((PAGES, PAGE_SIZE), np.uint8)
        noise = np.random.default_rng(rng.randrange(1 << 30))
        self.bytes[self.present] = noise.integers(1, 255, (int(self.present.sum()), PAGE_SIZE), np.uint8)
        with memory_of(puppet.pid, "r+b") as memory:
            for page in np.flatnonzero(self.present).tolist():
                os.pwrite(memory, self.bytes[page].tobytes(), address + page * PAGE_SIZE)

    @property
    def planned(self) -> NDArray[np.int8]:
        orders = np.where(self.present, 0, -1).astype(np.int8)
        for address, order in self.blocks:
            first = (address - self.address) // PAGE_SIZE
            orders[first : first + (1 << order)] = order
        return orders

    def orders(self, space: LiveAddressSpace) -> NDArray[np.int8]:
        """The order of the folio of each page; -1 for a hole, and for the zero page, which is one to the process."""
        columns = space.read([(self.address, self.address + PMD_SIZE)])
        there = columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO)
        return np.where(there, columns.folio_order, -1).astype(np.int8)

    def contents(self) -> NDArray[np.uint8]:
        with memory_of(self.puppet.pid) as memory:
            data = os.pread(memory, PMD_SIZE, self.address)
        return np.frombuffer(data, np.uint8).reshape(PAGES, PAGE_SIZE)

    def check(self, space: LiveAddressSpace, outcomes: list[BlockOutcome]) -> None:
        """All blocks have the planned order, all bytes are right, and nothing is resident that was not planned."""
        for (address, order), outcome in zip(self.blocks, outcomes, strict=True):
            assert (outcome.result, outcome.reason) == (ScanResult.SUCCEED, ""), outcome
            first = (address - self.address) // PAGE_SIZE
            assert outcome.filled == (1 << order) - int(self.present[first : first + (1 << order)].sum())
            assert not outcome.left_filled
        assert runs_of(self.orders(space)) == runs_of(self.planned)
        assert resident_of(self.puppet.pid, self.address) == int((self.planned >= 0).sum()) * PAGE_SIZE
        assert (self.contents() == self.bytes).all()


class memory_of:  # noqa: N801 - reads as a statement
    def __init__(self, pid: int, mode: str = "rb") -> None:
        self._file = Path(f"/proc/{pid}/mem").open(mode, buffering=0)  # noqa: SIM115

    def __enter__(self) -> int:
        return self._file.fileno()

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _random_blocks(address: int, rng: random.Random, present: NDArray[np.bool_]) -> list[Block]:
    """Random aligned blocks, each with something in it."""
    blocks: list[Block] = []

    def place(first: int, order: int) -> None:
        if not present[first : first + (1 << order)].any() or order < 2:
            return
        if order < PMD_ORDER and rng.random() < 0.3:
            blocks.append((address + first * PAGE_SIZE, order))
        elif rng.random() < 0.9:
            place(first, order - 1)
            place(first + (1 << order - 1), order - 1)

    while not blocks:
        place(0, PMD_ORDER)
    rng.shuffle(blocks)
    return blocks


def runs_of(orders: NDArray[Any]) -> list[tuple[int, int]]:
    """What `orders` are, and for how many pages each; so a difference can be read."""
    return [(order, len(list(run))) for order, run in itertools.groupby(orders.tolist())]


def resident_of(pid: int, address: int) -> int:
    """Rss of the mapping at `address` as smaps has it, in bytes."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    at = text.index(f"{address:x}-")
    return int(text[at:].partition("\nRss:")[2].split()[0]) << 10


def test_random_layouts_come_out_as_planned_in_another_process(puppet: Puppet) -> None:
    rng = random.Random(4)
    with open_live(puppet.pid) as space:
        for _ in range(LAYOUTS):
            address = puppet.map(PMD_SIZE)
            target = Target(puppet, address, rng)
            target.check(space, space.collapse_blocks(target.blocks, SPLIT))
            puppet.tell("munmap", address, PMD_SIZE)


def test_several_ranges_are_made_in_one_call(puppet: Puppet) -> None:
    rng = random.Random(5)
    with open_live(puppet.pid) as space:
        targets = [Target(puppet, puppet.map(PMD_SIZE), rng) for _ in range(4)]
        blocks = [block for target in targets for block in target.blocks]
        rng.shuffle(blocks)
        outcomes = dict(zip(blocks, space.collapse_blocks(blocks, SPLIT), strict=True))
        for target in targets:
            target.check(space, [outcomes[block] for block in target.blocks])


def test_what_was_made_before_stays_when_more_is_made_in_its_range(puppet: Puppet) -> None:
    address = puppet.map(PMD_SIZE)
    first, second = (address, 4), (address + (64 << 10 if PAGE_SIZE == 4096 else 16 * PAGE_SIZE), 3)
    with open_live(puppet.pid) as space:
        target = Target(puppet, address, random.Random(1), blocks=[first])
        target.bytes[:20] = 7
        target.present[:20] = True
        puppet_write(target)
        target.check(space, space.collapse_blocks([first], SPLIT))
        target.blocks = [second]
        (outcome,) = space.collapse_blocks([second], SPLIT)
        assert outcome.result is ScanResult.SUCCEED
        target.blocks = [first, second]
        assert runs_of(target.orders(space)) == runs_of(target.planned)
        assert (target.contents() == target.bytes).all()


def puppet_write(target: Target) -> None:
    with memory_of(target.puppet.pid, "r+b") as memory:
        for page in np.flatnonzero(target.present).tolist():
            os.pwrite(memory, target.bytes[page].tobytes(), target.address + page * PAGE_SIZE)


def test_auto_makes_folios_below_the_pmd_order_by_splitting(puppet: Puppet) -> None:
    target = Target(puppet, puppet.map(PMD_SIZE), random.Random(6))
    with open_live(puppet.pid) as space:
        assert {space.mechanism_for(order, "auto") for _, order in target.blocks} == {"split"}
        assert space.mechanism_for(PMD_ORDER, "split") == "madvise"
        target.check(space, space.collapse_blocks(target.blocks))


def test_a_plan_is_carried_out_by_splitting(puppet: Puppet) -> None:
    address, other = puppet.map(PMD_SIZE), puppet.map(PMD_SIZE)
    puppet.write(address, 32)
    puppet.write(other + 64 * PAGE_SIZE, 16)
    report = library.collapse(puppet.pid, orders=["order=4"], mechanism="split", within=(address, address + PMD_SIZE))
    assert report.folios[4].made == 2
    assert report.mechanisms == {4: "split"}
    report = library.collapse(puppet.pid, orders=["order=4"], within=(other, other + PMD_SIZE))
    assert report.mechanisms == {4: "split"}
    assert report.folios[4].made == 1
    with open_live(puppet.pid) as space:
        for start, first, count in ((address, 0, 32), (other, 64, 16)):
            begin = start + first * PAGE_SIZE
            assert (space.read([(begin, begin + count * PAGE_SIZE)]).folio_order == 4).all()
            assert resident_of(puppet.pid, start) == count * PAGE_SIZE


# --- what is left alone ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "result", "word"),
    [
        (lambda puppet, at: puppet.tell("madvise", at, PMD_SIZE, MADV_NOHUGEPAGE), ScanResult.VMA_CHECK, "NOHUGE"),
        (lambda puppet, at: puppet.tell("mlock", at, PMD_SIZE, 1), ScanResult.VMA_CHECK, "mlocked"),
        (lambda puppet, at: puppet.tell("set_thp_disable", 1), ScanResult.VMA_CHECK, "PR_SET_THP_DISABLE"),
        (lambda puppet, at: puppet.tell("fork"), ScanResult.EXCEED_SHARED_PTE, "shared"),
        (lambda puppet, at: puppet.tell("munmap", at + PMD_SIZE // 2, PMD_SIZE // 2), ScanResult.VMA_CHECK, "smaller"),
        (lambda puppet, at: puppet.tell("pin", at, PAGE_SIZE), ScanResult.PAGE_COUNT, ""),
    ],
    ids=["nohugepage", "mlock", "prctl", "fork", "partly-mapped", "pinned"],
)
def test_a_range_is_left_as_it_is(
    puppet: Puppet, stage: Callable[[Puppet, int], object], result: ScanResult, word: str
) -> None:
    address = puppet.map(PMD_SIZE)
    puppet.write(address, 20)
    puppet.write(address + PMD_SIZE // 4, 1)
    stage(puppet, address)
    with open_live(puppet.pid) as space:
        before = resident_of(puppet.pid, address)
        (outcome,) = space.collapse_blocks([(address, 4)], SPLIT)
        assert outcome.result is result, outcome
        assert word in outcome.reason
        assert resident_of(puppet.pid, address) == before
        columns = space.read([(address, address + PMD_SIZE // 4)])
        assert columns.folio_order.max() == 0


def test_guard_pages_keep_their_range_as_it_is(puppet: Puppet) -> None:
    address = puppet.map(PMD_SIZE)
    puppet.write(address, 16)
    try:
        puppet.tell("madvise", address + 32 * PAGE_SIZE, PAGE_SIZE, MADV_GUARD_INSTALL)
    except OSError:
        pytest.skip("no guard pages before Linux 6.13")
    with open_live(puppet.pid) as space:
        (outcome,) = space.collapse_blocks([(address, 4)], SPLIT)
        assert outcome.result is not ScanResult.SUCCEED
        assert space.read([(address, address + 16 * PAGE_SIZE)]).folio_order.max() == 0


def test_locked_memory_without_holes_is_made(puppet: Puppet) -> None:
    address = puppet.map(PMD_SIZE)
    puppet.write(address, PAGES)
    puppet.tell("mlock", address, PMD_SIZE, 0)
    with open_live(puppet.pid) as space:
        (outcome,) = space.collapse_blocks([(address, 4)], SPLIT)
        assert outcome.result is ScanResult.SUCCEED
        orders = space.read([(address, address + PMD_SIZE)]).folio_order
        assert (orders[:16] == 4).all()
        assert (orders[16:] == 0).all()


def test_a_target_without_room_for_a_pmd_folio_is_left_alone() -> None:
    with memory_cgroup() as cgroup, Puppet() as puppet:
        address = puppet.map(PMD_SIZE)
        puppet.write(address, 16)
        cgroup.limit(PMD_SIZE + (32 << 20))
        cgroup.enter(puppet.pid)
        with open_live(puppet.pid) as space:
            (outcome,) = space.collapse_blocks([(address, 4)], SPLIT)
        assert outcome.result is ScanResult.CGROUP_CHARGE_FAIL
        assert "are left in" in outcome.reason
        assert outcome.everywhere
        assert resident_of(puppet.pid, address) == 16 * PAGE_SIZE


# --- what happens between the collapse and a split -------------------------------------------------------------------


class Staged(SplitFile):
    """The system's file, before whose n-th write something happens."""

    def __init__(self, stage: Callable[[], object], at: int = 0, refuses: bool = False) -> None:
        super().__init__()
        self._stage, self._at, self._refuses, self.writes = stage, at, refuses, 0

    def split(self, pid: int, address: int, page_size: int, order: int, at: int | None = None) -> int:
        if self.writes == self._at:
            self._stage()
        self.writes += 1
        if self._refuses and self.writes > self._at:
            return 1
        return super().split(pid, address, page_size, order, at)


def staged(space: LiveAddressSpace, file: SplitFile, blocks: list[Block]) -> list[BlockOutcome]:
    space._made_splitter = SplitBlocks(space, ABILITY, file)
    return space.collapse_blocks(blocks, SPLIT)


@pytest.fixture(params=[0, 2], ids=["before-the-first-split", "before-the-third"])
def step(request: pytest.FixtureRequest) -> int:
    number: int = request.param
    return number


def test_a_fork_between_the_steps(puppet: Puppet, step: int) -> None:
    target = Target(puppet, puppet.map(PMD_SIZE), random.Random(8))
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
        # What is resident is what the blocks have and what is told to have stayed.
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
    target = Target(puppet, puppet.map(PMD_SIZE), random.Random(10))
    half = PMD_SIZE // 2
    with open_live(puppet.pid) as space:
        staged(space, Staged(lambda: puppet.tell("munmap", target.address, half), step), target.blocks)
        orders = target.orders(space)
        assert (orders[: PAGES // 2] == -1).all()
        assert runs_of(orders[PAGES // 2 :] >= 0) == runs_of(target.planned[PAGES // 2 :] >= 0)
        with memory_of(puppet.pid) as memory:
            data = os.pread(memory, half, target.address + half)
        assert data == target.bytes[PAGES // 2 :].tobytes()


def test_memory_locked_between_the_steps_keeps_what_was_filled_and_it_is_told(puppet: Puppet) -> None:
    target = Target(puppet, puppet.map(PMD_SIZE), random.Random(11))
    with open_live(puppet.pid) as space:
        file = Staged(lambda: puppet.tell("mlock", target.address, PMD_SIZE, 0))
        outcomes = staged(space, file, target.blocks)
        assert sum(outcome.left_filled for outcome in outcomes) == int((target.planned < 0).sum())
        assert (target.contents() == target.bytes).all()
        assert {outcome.result for outcome in outcomes} == {ScanResult.SUCCEED}


def test_a_target_that_exits_between_the_steps(puppet: Puppet, step: int) -> None:
    target = Target(puppet, puppet.map(PMD_SIZE), random.Random(12))
    other = Target(puppet, puppet.map(PMD_SIZE), random.Random(12))
    with open_live(puppet.pid) as space:
        outcomes = staged(space, Staged(puppet.kill, step), target.blocks + other.blocks)
        assert {outcome.result for outcome in outcomes} == {ScanResult.ANY_PROCESS}


def test_where_the_file_refuses_in_the_middle_the_fill_goes_back_by_madv_cold(puppet: Puppet, step: int) -> None:
    target = Target(puppet, puppet.map(PMD_SIZE), random.Random(13))
    with open_live(puppet.pid) as space:
        outcomes = staged(space, Staged(lambda: None, step, refuses=True), target.blocks)
        assert (target.contents() == target.bytes).all()
        orders = target.orders(space)
        assert not (~target.present & (target.planned < 0) & (orders >= 0)).any()
        assert not any(outcome.left_filled for outcome in outcomes)
        if step == 0:
            assert orders.max() == 0
            assert {outcome.result for outcome in outcomes} == {ScanResult.PAGE_COUNT}


@pytest.mark.parametrize("writes", range(0, 6, 2))
def test_killed_in_the_middle_it_leaves_nothing_to_undo(puppet: Puppet, writes: int) -> None:
    target = Target(puppet, puppet.map(PMD_SIZE), random.Random(14))
    switches = {path: path.read_text() for path in Path(ThpSysfs().root).rglob("*enabled")}
    script = f"""
import os, signal, sys
from mthp.means import Means
from mthp.linux import splitfile
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
    # And another run makes what was planned of whatever it finds.
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


@pytest.mark.parametrize("flags", ["-", "d", "f", "z"])
def test_threads_lose_nothing_while_their_memory_is_made_again_and_again(flags: str) -> None:
    rng = random.Random(3)
    end = time.monotonic() + CHURN_SECONDS
    results: Counter[tuple[ScanResult, str]] = Counter()
    with Churn(3, max(8, 2 * PMD_SIZE >> 20), 40, flags) as churn, open_live(churn.pid) as space:
        while time.monotonic() < end:
            address = churn.address + rng.randrange(churn.size // PMD_SIZE) * PMD_SIZE
            columns = space.read([(address, address + PMD_SIZE)])
            present = columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO)
            if present.any():
                outcomes = space.collapse_blocks(_random_blocks(address, rng, present), SPLIT)
                results.update((outcome.result, outcome.reason) for outcome in outcomes)
        assert churn.finish() == 0
        assert churn.accesses
    made = sum(count for (result, _), count in results.items() if result is ScanResult.SUCCEED)
    # What is discarded all the time may not be there any more when it is made.
    assert made if flags != "d" else results, results


def test_memory_of_this_process_is_made_too() -> None:
    with mmap.mmap(-1, 3 * PMD_SIZE, mmap.MAP_PRIVATE) as memory, open_live("self") as space:
        view = ctypes.c_char.from_buffer(memory)
        start = -(-ctypes.addressof(view) // PMD_SIZE) * PMD_SIZE
        del view
        ctypes.memset(start, 5, 16 * PAGE_SIZE)
        (outcome,) = space.collapse_blocks([(start, 4)], SPLIT)
        assert outcome.result is ScanResult.SUCCEED
        assert ctypes.string_at(start, 17 * PAGE_SIZE) == b"\5" * 16 * PAGE_SIZE + bytes(PAGE_SIZE)


def test_memory_that_may_be_read_only(puppet: Puppet) -> None:
    address = puppet.map(PMD_SIZE)
    puppet.write(address, 16)
    puppet.tell("mprotect", address, PMD_SIZE, PROT_READ)
    with open_live(puppet.pid) as space:
        (outcome,) = space.collapse_blocks([(address, 4)], SPLIT)
        # Before Linux 6.19 one page must be writable for a collapse.
        assert outcome.result in (ScanResult.SUCCEED, ScanResult.VMA_CHECK, ScanResult.PAGE_RO)
        assert resident_of(puppet.pid, address) == 16 * PAGE_SIZE
