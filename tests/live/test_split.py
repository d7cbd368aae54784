"""Folios made in place: random layouts in other processes, and ranges that are left as they are."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
from collections import Counter
from collections.abc import Callable

import pytest

import mthp as library
from memory_cgroups import memory_cgroup
from mthp.linux.live import open_live
from mthp.results import ScanResult
from split_ranges import PAGES, SPLIT, SPLITS, Target, resident_of, runs_of
from targets import (
    MADV_GUARD_INSTALL,
    MADV_NOHUGEPAGE,
    PAGE_SIZE,
    PMD_ORDER,
    PMD_SIZE,
    PROT_READ,
    Puppet,
)

LAYOUTS = int(os.environ.get("MTHP_TEST_LAYOUTS", "40"))
BATCH = 100
"""Layouts of one test: an emulated processor makes four a second."""

SELDOM = 0.02
"""Part of the blocks that the kernel may refuse for a reason that passes."""

pytestmark = [*SPLITS, pytest.mark.usefixtures("no_sizes")]


@pytest.mark.parametrize("batch", range(-(-LAYOUTS // BATCH)))
def test_random_layouts_come_out_as_planned_in_another_process(puppet: Puppet, batch: int) -> None:
    rng = random.Random(4 + batch)
    layouts = min(BATCH, LAYOUTS - batch * BATCH)
    orders: Counter[int] = Counter()
    refused: Counter[str] = Counter()
    with open_live(puppet.pid) as space:
        for _ in range(layouts):
            address = puppet.map(PMD_SIZE)
            target = Target(puppet, address, rng)
            outcomes = space.collapse_blocks(target.blocks, SPLIT)
            if why := [each for each in outcomes if each.result is not ScanResult.SUCCEED]:
                refused.update(f"{each.result.name} {each.reason or f'errno {each.errno}'}" for each in why)
                assert (target.contents() == target.bytes).all()
                assert resident_of(puppet.pid, address) <= int((target.planned >= 0).sum()) * PAGE_SIZE
            else:
                target.check(space, outcomes)
                orders.update(order for _, order in target.blocks)
            puppet.tell("munmap", address, PMD_SIZE)
    made = ", ".join(f"{count} of order {order}" for order, count in sorted(orders.items()))
    print(f"{layouts} layouts, {orders.total()} blocks as planned ({made}); refused: {dict(refused) or 'none'}")
    # Rarely, a page with a short reference of the kernel is not collapsed.
    assert refused.total() <= orders.total() * SELDOM


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
        target.write()
        target.check(space, space.collapse_blocks([first], SPLIT))
        target.blocks = [second]
        (outcome,) = space.collapse_blocks([second], SPLIT)
        assert outcome.result is ScanResult.SUCCEED
        target.blocks = [first, second]
        assert runs_of(target.orders(space)) == runs_of(target.planned)
        assert (target.contents() == target.bytes).all()


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
