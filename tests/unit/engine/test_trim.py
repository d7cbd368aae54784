"""Trimming: which folios are worth it, which pages are read, and the outcome of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from fakes import FakeSpace, page_runs
from mthp.cli.render.output import console
from mthp.cli.trim_command import TrimSum, print_report
from mthp.engine.trim import TrimOptions, TrimReport, plan_trim, trim_space
from mthp.errors import TargetVanishedError, UnsupportedError, UsageError
from mthp.geometry import X86_64
from mthp.ptes import ORDER_NONE, Block, Pte, PteColumns
from mthp.results import ScanResult
from mthp.trimming import TrimBy, TrimOutcome
from mthp.vma import Vma

BASE = 1 << 40
PMD, PAGE, N = X86_64.pmd_size, X86_64.page_size, X86_64.ptes_per_pmd
HUGE = int(Pte.PRESENT | Pte.PMD_MAPPED)


class Wasteful(FakeSpace):
    """A space with contents, and folios that can be trimmed.

    Attributes:
        empty: addresses of pages that hold nothing but zeroes.
        asked: pages whose contents were read.
        batches: the folios of every call.
        pinned: addresses of folios that cannot be split.
    """

    trims_by: tuple[TrimBy, ...] = ("cold",)

    def __init__(self, *arguments: Any, empty: set[int], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.empty = empty
        self.asked = 0
        self.batches: list[list[Block]] = []
        self.pinned: set[int] = set()

    def read(self, segments: Sequence[tuple[int, int]]) -> PteColumns:
        columns = super().read(segments)
        pages = np.concatenate(
            [np.arange(start // PAGE, end // PAGE) for start, end in segments] or [np.empty(0, np.int64)]
        )
        there = (columns.state & np.uint16(Pte.PRESENT)) != 0
        return PteColumns(
            columns.segments, columns.state, columns.folio_order, np.where(there, pages, 0).astype(np.uint64)
        )

    def zero_filled(self, columns: PteColumns) -> NDArray[np.bool_]:
        self.asked += len(columns.state)
        pages = [page for start, end in columns.segments for page in range(start, end, PAGE)]
        return np.array([page in self.empty for page in pages], np.bool_)

    def trim_folios(self, folios: Sequence[Block], zero: Sequence[NDArray[np.bool_]], by: TrimBy) -> list[TrimOutcome]:
        self._check_alive()
        self.batches.append(list(folios))
        outcomes = []
        for (address, order), pages in zip(folios, zero, strict=True):
            if address in self.pinned:
                outcomes.append(TrimOutcome(address, order, ScanResult.PAGE_COUNT, "pinned", left={order: 1}))
                continue
            for page in range(1 << order):
                at = address + page * PAGE
                self.write(at, *((0, ORDER_NONE) if pages[page] else (int(Pte.PRESENT), 0)), 1)
            given = int(pages.sum())
            left = {0: (1 << order) - given}
            outcomes.append(TrimOutcome(address, order, ScanResult.SUCCEED, "", given, left, elapsed_ns=1000))
        return outcomes


def space(*empty: int, **options: Any) -> Wasteful:
    """Return a PMD folio for each number, which is the count of its empty pages, from the last one down."""
    state, order = page_runs((N * len(empty), HUGE, 9))
    pages = {BASE + row * PMD + (N - 1 - page) * PAGE for row, count in enumerate(empty) for page in range(count)}
    return Wasteful([(Vma(BASE, BASE + PMD * len(empty), "rw-p"), state, order)], empty=pages, **options)


def test_those_with_most_zeroes_come_first_and_the_full_ones_are_left_alone() -> None:
    target = space(300, 0, 500, 200)
    plan = plan_trim(target, TrimOptions())
    assert plan.folios == [(BASE + 2 * PMD, 9), (BASE, 9)]
    assert (plan.scanned_folios, plan.zero_bytes, plan.by) == (4, 800 * PAGE, "cold")
    report = trim_space(target, TrimOptions())
    assert target.batches == [plan.folios]
    assert (report.trimmed, report.given_back_bytes, report.left_by_order) == (2, 800 * PAGE, {0: 2 * N - 800})
    assert report.rss_before_bytes - report.rss_after_bytes == report.given_back_bytes
    assert report.complete


def test_full_folios_cost_a_sample_only() -> None:
    target = space(*[0] * 8)
    plan_trim(target, TrimOptions())
    assert target.asked < 8 * N // 16


@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
def test_no_folio_is_missed_whose_zeroes_lie_together(share: float) -> None:
    count = max(1, int(share * N))
    plan = plan_trim(space(count, count - 1), TrimOptions(zero=count / N))
    assert plan.folios == [(BASE, 9)]


def test_a_folio_that_is_mapped_in_part_is_not_taken() -> None:
    target = space(400)
    target.write(BASE + (N - 1) * PAGE, 0, ORDER_NONE, 1)
    assert plan_trim(target, TrimOptions()).folios == []


def test_what_cannot_be_split_has_its_reason() -> None:
    target = space(400, 400)
    target.pinned = {BASE}
    report = trim_space(target, TrimOptions())
    assert (report.trimmed, report.failed_by_result, report.reasons) == (1, {"PAGE_COUNT": 1}, {"pinned": 1})
    assert report.table_columns() == {"result": ["SUCCEED", "PAGE_COUNT"], "reason": ["", "pinned"], "folios": [1, 1]}
    assert not report.complete


def test_a_dry_run_changes_nothing() -> None:
    target = space(400)
    report = trim_space(target, TrimOptions(), dry_run=True)
    assert (target.batches, report.trimmed, report.not_tried, report.complete) == ([], 0, 0, True)


def test_it_stops_when_told() -> None:
    target = space(*[400] * 40)
    report = trim_space(target, TrimOptions(), stop=lambda: len(target.batches) == 1)
    assert report.interrupted
    assert (report.trimmed, report.not_tried, report.complete) == (16, 24, False)


def test_it_stops_before_contents_are_read() -> None:
    target = space(400)
    for dry_run in (True, False):
        report = trim_space(target, TrimOptions(), dry_run=dry_run, stop=lambda: True)
        assert (report.interrupted, report.complete) == (True, False)
    assert (target.asked, target.batches) == (0, [])


def test_by_splits_only_whole_empty_blocks_are_counted() -> None:
    # Of the last 408 pages 8 share a block of 64 KiB with pages that are used.
    target = space(408)
    target.trims_by = ("split", "cold")
    assert plan_trim(target, TrimOptions(by="cold")).gains == [408]
    assert plan_trim(target, TrimOptions()).gains == [400]
    scattered = space(0)
    scattered.empty = {BASE + page * PAGE for page in range(0, N, 2)}
    assert plan_trim(scattered, TrimOptions(by="split")).folios == []
    assert plan_trim(scattered, TrimOptions(by="cold")).gains == [N // 2]


def test_a_target_that_vanishes() -> None:
    class Dying(Wasteful):
        def trim_folios(self, *arguments: Any) -> list[TrimOutcome]:
            raise TargetVanishedError("gone")

    state, order = page_runs((N, HUGE, 9))
    empty = {BASE + page * PAGE for page in range(N)}
    target = Dying([(Vma(BASE, BASE + PMD, "rw-p"), state, order)], empty=empty)
    report = trim_space(target, TrimOptions())
    assert (report.vanished, report.not_tried, report.complete) == (True, 1, False)


def test_where_nothing_can_be_trimmed() -> None:
    target = space(400)
    target.trims_by = ()
    assert isinstance(trim_space(target, TrimOptions(), dry_run=True), TrimReport)
    with pytest.raises(UnsupportedError):
        trim_space(target, TrimOptions())
    state, order = page_runs((N, HUGE, 9))
    with pytest.raises(UnsupportedError, match="no contents"):
        plan_trim(FakeSpace([(Vma(BASE, BASE + PMD, "rw-p"), state, order)]), TrimOptions())


@pytest.mark.parametrize("options", [{"zero": 0.0}, {"zero": 1.5}, {"rate": 0}])
def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        TrimOptions(**options)


def test_what_is_out_of_reach_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    vma = Vma(BASE, BASE + 6 * PAGE, "rw-p", has_anon_vma=True)
    space = Wasteful([(vma, *page_runs((5, Pte.PRESENT, 0), (1, 0, ORDER_NONE)))], empty=set())
    report = trim_space(space, TrimOptions(), dry_run=True)
    assert report.plan.out_of_reach_bytes == 5 * PAGE
    assert TrimSum([report, report]).out_of_reach_bytes == 10 * PAGE
    print_report(console(), report, TrimOptions())
    assert "out of reach: 20K lie in no whole 2M range" in " ".join(capsys.readouterr().out.split())
