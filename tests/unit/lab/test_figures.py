"""The definitions of figures, on numbers that can be checked by hand."""

from __future__ import annotations

import math

import pytest

from mthp.lab import figures
from mthp.sim.clock import Costs


def test_every_metric_has_a_unit_and_a_meaning() -> None:
    units = {"bytes", "share", "seconds", "pages", "entries", "folios", "count"}
    assert {metric.unit for metric in figures.METRICS.values()} <= units
    assert all(metric.meaning for metric in figures.METRICS.values())
    assert figures.metric_of("order_share_4") is figures.METRICS["order_share"]


def test_translations_count_entries_by_how_memory_is_mapped() -> None:
    pages = [100, 0, 16, 0, 32, 0, 0, 0, 0, 1024]
    assert figures.translations(pages, 1024, 9) == 100 + 16 + 32 + 2
    assert figures.translations(pages, 1024, 9, coalesced_order=2) == 100 + 4 + 8 + 2
    assert figures.translations(pages, 512, 9, coalesced_order=4) == 100 + 4 + 2 + 32 + 1


def test_coverage_is_a_share_of_what_is_resident() -> None:
    assert figures.coverage_from([50, 0, 30, 20], 2) == 0.5
    assert figures.coverage_from([0, 0], 1) == 0.0


def test_time_to_coverage() -> None:
    assert figures.time_to_coverage([0, 1, 2, 3], [0.0, 0.4, 0.9, 0.8], 0.5) == 2.0
    assert math.isinf(figures.time_to_coverage([0, 1], [0.0, 0.4], 0.5))


@pytest.mark.parametrize(("values", "index"), [([1, 1, 1, 1], 1.0), ([1, 0, 0, 0], 0.25), ([0, 0], 1.0), ([2, 1], 0.9)])
def test_fairness_is_jains_index(values: list[float], index: float) -> None:
    assert figures.fairness(values) == pytest.approx(index)


def test_cost_adds_up() -> None:
    costs = Costs(scan_pte=10, scan_range=7, copy_byte=3, zero_byte=2, collapse=1000, alloc_large=500, collapse_pte=20)
    spent = figures.khugepaged_seconds(
        costs, ptes=100, ranges=5, copied_bytes=1000, zeroed_bytes=100, folios=2, folio_pages=64
    )
    assert spent == pytest.approx((1000 + 35 + 3000 + 200 + 3000 + 1280) / 1e12)
