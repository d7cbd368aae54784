"""The part of a report on policies agrees with the comparison."""

from __future__ import annotations

import numpy as np
import pytest

from mthp.geometry import X86_64
from mthp.heat import Heat
from mthp.lab.compare import compare, settings_of
from mthp.report import compared
from mthp.report.charts import LEFT
from mthp.units import percent
from report_spaces import redis_like


@pytest.fixture(scope="module")
def result() -> compared.Compared:
    settings = settings_of(["pmd-only", "per-order", "mainline"], max_ptes_none=[64, 511])
    return compared.Compared.of(compare(redis_like(), settings, scans=None))


def test_every_setting_is_a_point_of_its_policy(result: compared.Compared) -> None:
    chart = compared.frontier_chart(result)
    assert [(series.name, len(series.points)) for series in chart.series] == [
        ("pmd-only", 2),
        ("per-order", 2),
        ("mainline", 2),
    ]
    by_bloat = {row["setting"]: row["bloat_share"] for row in result.last}
    points = {point.text.split(":")[0]: point for series in chart.series for point in series.points}
    assert by_bloat.keys() == points.keys()
    worst = max(by_bloat, key=lambda name: by_bloat[name])
    assert points[worst].x == max(point.x for point in points.values())
    assert all(point.x > LEFT - 20 for point in points.values())
    assert chart.frontier.count("H") >= 1


def test_creep_is_drawn_for_what_creeps(result: compared.Compared) -> None:
    growing = {row["setting"] for row in result.rows if row["scan"] > 1 and row["creep_bytes"]}
    assert growing
    chart = compared.creep_chart(result)
    assert growing <= {series.name for series in chart.series}
    for series in chart.series:
        levels = [point.y for point in series.points[1:]]
        # The vertical axis of a drawing goes down.
        assert (levels[0] > levels[-1]) == (series.name in growing)
        assert series.line


def test_tables_hold_the_figures(result: compared.Compared) -> None:
    section = compared.section(result)
    figures, creep = section.tables
    assert [row[0].text for row in figures.rows] == result.settings
    assert {row[0].text for row in figures.rows if row[0].mark} == set(result.frontier)
    assert len(creep.columns) == result.scans + 1
    assert section.remarks == result.verdict


def test_a_column_weighs_by_heat_where_it_was_observed(result: compared.Compared) -> None:
    space, settings = redis_like(), settings_of(["pmd-only"], max_ptes_none=[0, 511])
    start = np.array([vma.start for vma in space.vmas()], np.uint64)
    seen = Heat.of_spans(start, start + np.uint64(X86_64.pmd_size), np.ones(len(start)))
    heated = compared.Compared.of(compare(space, settings, heat=seen))
    [table] = compared.section(heated).tables
    for name, key, text in (("hot coverage", "hot_coverage", percent), ("page walks", "tlb_misses", "{:,}".format)):
        at = list(table.columns).index(name)
        assert [row[at].text for row in table.rows] == [text(row[key]) for row in heated.last]
        assert name not in compared.section(result).tables[0].columns
    assert {row["hot_coverage"] for row in heated.last} != {0.0}


def test_settings_that_come_to_the_same_share_a_bar(result: compared.Compared) -> None:
    (bars,) = compared.section(result).bars
    assert bars.bars[0].name == "now"
    named = " ".join(bar.text for bar in bars.bars)
    assert all(setting in named for setting in result.settings)
    assert len(bars.bars) < 1 + len(result.settings)
    assert bars.legend[0] == ("o9", f"{X86_64.label(9)} folios")
