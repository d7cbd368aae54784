"""The contents of blocks, and the outcome of an attempt, follow from the entries."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeSpace, page_runs
from mthp.blockstates import SMALLER_FOLIOS, SPLIT_AGAIN, shown, states_of
from mthp.geometry import X86_64
from mthp.ptes import ORDER_NONE, ORDER_UNKNOWN, Pte, PteColumns, segments_of
from mthp.results import BlockOutcome, ScanResult
from mthp.vma import Vma

BASE, PAGE = 1 << 40, X86_64.page_size
K64 = 16 * PAGE
BLOCK = (BASE, 4)


def columns(state: Pte, order: int, frames: range | None = None) -> PteColumns:
    """Return the entries of one block of 64K."""
    pfn = None if frames is None else np.array(frames, np.uint64)
    return PteColumns(((BASE, BASE + K64),), np.full(16, state, np.uint16), np.full(16, order, np.int8), pfn)


@given(st.lists(st.integers(0, 63), min_size=1, unique=True))
def test_selected_entries_are_those_that_are_read(chosen: list[int]) -> None:
    runs = page_runs(*[part for at in range(32) for part in ((at % 16, Pte.PRESENT, at % 9), (32 - at % 16, 0, -1))])
    space = FakeSpace([(Vma(BASE, BASE + 64 * K64, "rw-p"), *runs)])
    segments = segments_of([(BASE + at * K64, 4) for at in chosen], PAGE)
    whole = space.read([(BASE, BASE + 10 * K64), (BASE + 10 * K64, BASE + 64 * K64)])
    if any(start < BASE + 10 * K64 < end for start, end in segments):
        whole = space.read([(BASE, BASE + 64 * K64)])
    selected, read = whole.select(segments, PAGE), space.read(segments)
    assert selected.segments == read.segments
    assert selected.state.tolist() == read.state.tolist()
    assert selected.folio_order.tolist() == read.folio_order.tolist()


@pytest.mark.parametrize(
    ("frames", "large"),
    [(None, True), (range(32, 48), True), (range(33, 49), False), (range(32, 64, 2), False)],
    ids=["unseen", "aligned", "unaligned", "apart"],
)
def test_one_folio_lies_in_frames_that_are_neighbours(frames: range | None, large: bool) -> None:
    states = states_of(columns(Pte.PRESENT, 4, frames), [BLOCK], X86_64)
    assert states.large.tolist() == [large]


SMALL, FOLIO, NOTHING = columns(Pte.PRESENT, 0), columns(Pte.PRESENT, 4), columns(Pte(0), ORDER_NONE)
UNSEEN = columns(Pte.PRESENT, ORDER_UNKNOWN)
REWRITTEN = PteColumns(FOLIO.segments, FOLIO.state, np.array([4, 0] + [4] * 14, np.int8))
"""A folio of which one page was freed and written again."""


@pytest.mark.parametrize(
    ("claim", "before", "after", "result", "sizes"),
    [
        (ScanResult.SUCCEED, SMALL, FOLIO, ScanResult.SUCCEED, (16, 0)),
        (ScanResult.SUCCEED, NOTHING, FOLIO, ScanResult.SUCCEED, (0, 16)),
        (ScanResult.FAIL, SMALL, FOLIO, ScanResult.SUCCEED, (16, 0)),
        (ScanResult.SUCCEED, UNSEEN, UNSEEN, ScanResult.SUCCEED, (16, 0)),
        (ScanResult.FAIL, UNSEEN, UNSEEN, ScanResult.FAIL, (0, 0)),
        (ScanResult.SUCCEED, SMALL, SMALL, ScanResult.ALLOC_HUGE_PAGE_FAIL, (0, 0)),
        (ScanResult.SUCCEED, SMALL, REWRITTEN, ScanResult.PTE_NON_PRESENT, (0, 0)),
        (ScanResult.SUCCEED, SMALL, NOTHING, ScanResult.PTE_NON_PRESENT, (0, 0)),
        (ScanResult.PAGE_COUNT, SMALL, SMALL, ScanResult.PAGE_COUNT, (0, 0)),
    ],
)
def test_what_is_said_is_what_is_shown(
    claim: ScanResult, before: PteColumns, after: PteColumns, result: ScanResult, sizes: tuple[int, int]
) -> None:
    states = [states_of(each, [BLOCK], X86_64) for each in (before, after)]
    (outcome,) = shown([BlockOutcome(*BLOCK, claim, elapsed_ns=7)], states[0], states[1], X86_64)
    assert (outcome.result, outcome.copied, outcome.filled, outcome.elapsed_ns) == (result, *sizes, 7)
    reasons = {ScanResult.ALLOC_HUGE_PAGE_FAIL: SMALLER_FOLIOS, ScanResult.PTE_NON_PRESENT: SPLIT_AGAIN}
    assert outcome.reason == reasons.get(result, "")


def test_bytes_that_changed_are_no_success() -> None:
    states = [states_of(each, [BLOCK], X86_64) for each in (SMALL, FOLIO)]
    (outcome,) = shown([BlockOutcome(*BLOCK, ScanResult.FAIL, "bytes", verified=False)], states[0], states[1], X86_64)
    assert (outcome.result, outcome.reason) == (ScanResult.FAIL, "bytes")


def test_addresses_beyond_the_half_of_the_address_space() -> None:
    vsyscall = 0xFFFF_FFFF_FF60_0000
    assert segments_of([(vsyscall, 0)], PAGE) == [(vsyscall, vsyscall + PAGE)]
    entry = PteColumns(((vsyscall, vsyscall + PAGE),), np.array([Pte.PRESENT], np.uint16), np.zeros(1, np.int8))
    assert states_of(entry, [(vsyscall, 0)], X86_64).full.tolist() == [True]


def test_a_refusal_of_everything_ends_where_another_made_the_folio() -> None:
    states = [states_of(each, [BLOCK], X86_64) for each in (SMALL, FOLIO)]
    refused = BlockOutcome(*BLOCK, ScanResult.FAIL, "another mthp works on it", everywhere=True, passing=True)
    (outcome,) = shown([refused], states[0], states[1], X86_64)
    assert (outcome.result, outcome.everywhere, outcome.passing) == (ScanResult.SUCCEED, False, False)


def test_what_an_attempt_left_filled_beside_a_block_is_told_with_its_reason() -> None:
    states = [states_of(each, [BLOCK], X86_64) for each in (SMALL, FOLIO)]
    for claimed in (ScanResult.SUCCEED, ScanResult.PAGE_COUNT):
        claim = BlockOutcome(*BLOCK, claimed, "it stays", left_filled=40)
        (outcome,) = shown([claim], states[0], states[1], X86_64)
        assert (outcome.result, outcome.left_filled, outcome.reason) == (ScanResult.SUCCEED, 40, "it stays")
