"""The mover through the seam: `collapse_blocks` of a live process, with every refusal of a block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from e2e.helpers import Actor
from mover_targets import BLOCK, GEOMETRY, mappings, pages_by_order
from mthp.linux.live import LiveAddressSpace, open_live
from mthp.linux.mover import mapping
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.taskfiles import Thread
from mthp.means import Means
from mthp.ptes import Block
from mthp.results import BlockOutcome, ScanResult
from targets import MADV_NOHUGEPAGE, PAGE_SIZE, PMD_ORDER, PMD_SIZE
from thp_switches import words_per_size
from waiting import FACTOR

pytestmark = [
    pytest.mark.usefixtures("no_sizes"),
    pytest.mark.live,
    pytest.mark.requires("root", "mthp", "mover", "pagemap_scan"),
]

PAGES = PMD_SIZE // PAGE_SIZE
HALF = PMD_SIZE // 2
PAUSE_NS = int(20_000_000 * FACTOR)
MAX_PAUSE = PAUSE_NS / 1e9
MOVE = Means(mechanism="move", max_pause=MAX_PAUSE, pause_share=1.0)


@pytest.fixture
def space(actor: Actor) -> Iterator[LiveAddressSpace]:
    with open_live(actor.pid) as space:
        yield space


def blocks(start: int, size: int, order: int) -> list[Block]:
    return [(address, order) for address in range(start, start + size, GEOMETRY.size_of(order))]


def results(outcomes: list[BlockOutcome]) -> dict[ScanResult, int]:
    return dict(Counter(outcome.result for outcome in outcomes))


def test_every_order_in_one_call(actor: Actor, space: LiveAddressSpace) -> None:
    address = actor.map(4 * PMD_SIZE)
    actor.fill(address, 4 * PMD_SIZE // PAGE_SIZE)
    before, words = mappings(actor.pid), words_per_size()
    wanted = blocks(address, HALF, 2) + blocks(address + PMD_SIZE, PMD_SIZE, PMD_ORDER)
    wanted += blocks(address + HALF, HALF, 7) + blocks(address + 2 * PMD_SIZE, PMD_SIZE, 4)
    wanted += blocks(address + 3 * PMD_SIZE, PMD_SIZE, 8)
    outcomes = space.collapse_blocks(wanted, Means("madvise,move", max_pause=MAX_PAUSE, pause_share=1.0, verify=True))
    assert results(outcomes) == {ScanResult.SUCCEED: len(wanted)}
    assert pages_by_order(actor.pid, address, 4 * PMD_SIZE) == {
        2: PAGES // 2,
        7: PAGES // 2,
        **dict.fromkeys((PMD_ORDER, 4, 8), PAGES),
    }
    assert words_per_size() == words
    assert actor.damaged(address, 4 * PMD_SIZE // PAGE_SIZE) == 0
    pauses = space.take_pauses()
    assert len(pauses) >= 4
    assert all(pause > 0 for pause in pauses)
    assert space.take_pauses() == []
    assert mappings(actor.pid) == before
    space.close()
    assert mappings(actor.pid) == before


def test_the_mechanisms(actor: Actor, space: LiveAddressSpace) -> None:
    address = actor.map(2 * PMD_SIZE)
    actor.fill(address, 2 * PMD_SIZE // PAGE_SIZE)
    wanted = [(address, PMD_ORDER), (address + PMD_SIZE, 4)]
    by_move = space.collapse_blocks(wanted, MOVE)
    assert [outcome.result for outcome in by_move] == [ScanResult.FAIL, ScanResult.SUCCEED]
    assert "MADV_COLLAPSE" in by_move[0].reason
    by_call = space.collapse_blocks([wanted[0], (address + PMD_SIZE + BLOCK, 4)], Means(mechanism="madvise"))
    assert [outcome.result for outcome in by_call] == [ScanResult.SUCCEED, ScanResult.FAIL]
    assert "mechanism move" in by_call[1].reason
    assert pages_by_order(actor.pid, address, PMD_SIZE + BLOCK) == {PMD_ORDER: PAGES, 4: 16}


def test_each_block_has_its_own_reason(actor: Actor, space: LiveAddressSpace) -> None:
    address = actor.map(PMD_SIZE)
    actor.fill(address, 4 * 16)
    actor.tell("read", address + 4 * BLOCK, 16, 1)
    actor.tell("madvise", address + BLOCK + PAGE_SIZE, PAGE_SIZE, 4)
    spared = actor.map(PMD_SIZE, advice=MADV_NOHUGEPAGE)
    actor.fill(spared, 16)
    wanted = [(address + at * BLOCK, 4) for at in range(6)] + [(spared, 4), (1 << 30, 4)]
    outcomes = space.collapse_blocks(wanted, MOVE)
    assert [outcome.result.name for outcome in outcomes] == [
        *("SUCCEED", "EXCEED_NONE_PTE", "SUCCEED", "SUCCEED", "NO_PTE_TABLE", "NO_PTE_TABLE"),
        *("VMA_CHECK", "ADDRESS_RANGE"),
    ]
    assert "MADV_NOHUGEPAGE" in outcomes[6].reason
    assert all(outcome.reason for outcome in outcomes if outcome.result is not ScanResult.SUCCEED)
    again = space.collapse_blocks(wanted[:1], MOVE)
    assert results(again) == {ScanResult.PTE_MAPPED_HUGEPAGE: 1}
    filled = space.collapse_blocks(
        [wanted[1], wanted[4]],
        Means(mechanism="move", max_pause=MAX_PAUSE, pause_share=1.0, fill=True, verify=True),
    )
    assert [outcome.result.name for outcome in filled] == ["SUCCEED", "NO_PTE_TABLE"]
    assert actor.damaged(address + 2 * BLOCK, 32) == 0
    assert actor.damaged(address, 17) == 0
    assert actor.unwritten(address + BLOCK + PAGE_SIZE, 1) == 1


@pytest.mark.parametrize("query", [mapping.PROCMAP_QUERY, 0xC06866FF], ids=["query", "as before Linux 6.11"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("madvise", PAGE_SIZE, PAGE_SIZE, 4), "went away meanwhile"),
        (("mprotect", PAGE_SIZE, PAGE_SIZE, 1), "not lie inside one mapping"),
    ],
    ids=["page dropped", "mapping split"],
)
def test_a_change_before_the_stop_is_the_reason_of_its_block(
    actor: Actor,
    space: LiveAddressSpace,
    monkeypatch: pytest.MonkeyPatch,
    change: tuple[str, int, int, int],
    reason: str,
    query: int,
) -> None:
    """The other blocks are moved, also those that are checked again because their mapping changed."""
    address = actor.map(PMD_SIZE)
    actor.fill(address, 4 * 16)
    stop, stops = FrozenProcess.stop, 0

    def late(self: FrozenProcess, known: dict[int, Thread]) -> None:
        nonlocal stops
        stops += 1
        if stops == 1:
            verb, offset, *rest = change
            actor.tell(verb, address + offset, *rest)
        stop(self, known)

    monkeypatch.setattr(FrozenProcess, "stop", late)
    # Not an argument, because the number is the kernel's: older kernels do not know it.
    monkeypatch.setattr(mapping, "PROCMAP_QUERY", query)
    first, *others = space.collapse_blocks(blocks(address, 4 * BLOCK, 4), MOVE)
    assert first.result is not ScanResult.SUCCEED
    assert reason in first.reason
    assert results(others) == {ScanResult.SUCCEED: 3}
    assert pages_by_order(actor.pid, address + BLOCK, 3 * BLOCK) == {4: 48}
    assert actor.damaged(address + BLOCK, 48) == 0


def test_a_refusal_of_the_process_is_the_reason_of_every_block(actor: Actor, space: LiveAddressSpace) -> None:
    address = actor.map(PMD_SIZE)
    actor.fill(address, 64)
    before = mappings(actor.pid)
    actor.tell("set_thp_disable", 1)
    outcomes = space.collapse_blocks(blocks(address, 4 * BLOCK, 4), MOVE)
    assert {(outcome.result, "PR_SET_THP_DISABLE" in outcome.reason) for outcome in outcomes} == {
        (ScanResult.FAIL, True)
    }
    assert mappings(actor.pid) == before
    actor.tell("set_thp_disable", 0)
    assert results(space.collapse_blocks(blocks(address, 4 * BLOCK, 4), MOVE)) == {ScanResult.SUCCEED: 4}
