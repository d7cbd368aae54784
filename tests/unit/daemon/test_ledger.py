"""The record of finished ranges: when each is due again."""

from __future__ import annotations

import numpy as np

from mthp.daemon.ledger import FIRST_AGE, Ledger
from mthp.geometry import Geometry
from mthp.outline import Outline
from mthp.results import ScanResult

SMALL = Geometry("small", 4096, 3)


def rows(*layouts: int) -> Outline:
    count = len(layouts)
    return Outline(
        np.arange(count, dtype=np.uint64) * np.uint64(SMALL.pmd_size),
        np.full(count, 4, np.int32),
        np.zeros(count, np.bool_),
        np.array(layouts, np.uint64),
    )


def results(*values: ScanResult) -> np.ndarray[tuple[int], np.dtype[np.int8]]:
    return np.array(values, np.int8)


def test_a_finished_range_is_due_again_when_its_layout_changes() -> None:
    ledger = Ledger()
    outline = rows(1, 2, 3)
    assert ledger.due(outline, 0.0).all()
    ledger.scanned(outline.address, results(*[ScanResult.EXCEED_NONE_PTE] * 3), outline, 0.0, 10.0)
    assert not ledger.due(outline, 1.0).any()
    assert ledger.due(rows(1, 9, 3), 1.0).tolist() == [False, True, False]


def test_layouts_are_remembered_as_they_are_after_the_collapse() -> None:
    ledger = Ledger()
    ledger.due(rows(1), 0.0)
    ledger.scanned(rows(1).address, results(ScanResult.SUCCEED), rows(5), 0.0, 10.0)
    assert not ledger.due(rows(5), 1.0).any()
    assert ledger.due(rows(1), 1.0).all()


def test_a_range_grows_due_by_age_only_if_the_process_did_anything() -> None:
    ledger = Ledger()
    outline = rows(1)
    ledger.due(outline, 0.0)
    ledger.scanned(outline.address, results(ScanResult.EXCEED_NONE_PTE), outline, 0.0, 10.0)
    assert not ledger.due(outline, FIRST_AGE + 1, touched=False).any()
    assert ledger.due(outline, FIRST_AGE + 1).all()
    ledger.scanned(outline.address, results(ScanResult.EXCEED_NONE_PTE), outline, FIRST_AGE, 10.0)
    assert not ledger.due(outline, 2.9 * FIRST_AGE).any()
    assert ledger.due(outline, 3.1 * FIRST_AGE).all()


def test_a_passing_failure_is_tried_again_later_and_later_whatever_the_layout() -> None:
    ledger = Ledger()
    now, waits = 0.0, []
    for layout in range(1, 5):
        outline = rows(layout)
        ledger.due(outline, now)
        ledger.scanned(outline.address, results(ScanResult.PAGE_COUNT), outline, now, 10.0)
        assert not ledger.due(rows(layout + 1), now + 0.01).any()
        waits.append(ledger.next_retry() - now)
        now = ledger.next_retry()
        assert ledger.due(outline, now, touched=False).all()
    assert waits == [0.5, 1.0, 2.0, 4.0]


def test_ranges_that_are_gone_are_forgotten() -> None:
    ledger = Ledger()
    ledger.due(rows(1, 2, 3), 0.0)
    ledger.scanned(rows(1, 2, 3).address, results(*[ScanResult.PAGE_LOCK] * 3), rows(1, 2, 3), 0.0, 10.0)
    ledger.due(rows(1), 0.1)
    assert ledger.address.tolist() == [0]
    assert ledger.due(rows(1, 2), 0.1).tolist() == [False, True]


def test_after_a_change_of_rules_everything_is_due() -> None:
    ledger = Ledger()
    ledger.due(rows(1, 2), 0.0)
    ledger.scanned(rows(1, 2).address, results(ScanResult.EXCEED_NONE_PTE, ScanResult.PAGE_LOCK), rows(1, 2), 0.0, 10.0)
    ledger.forget()
    assert ledger.due(rows(1, 2), 0.0).all()
