"""Reports as values and as text: frontier, charts, escaping, writing."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeSpace
from mthp.engine.select import PlanOptions
from mthp.errors import MthpError
from mthp.ptes import ORDER_NONE, Pte
from mthp.report.charts import Series, bar_chart, chart, nice_ticks
from mthp.report.document import Cell, Command, Document, Figure, ReportTable, Section
from mthp.report.gather import Source, report_on
from mthp.report.page import html_of, write
from report_spaces import HOSTILE, hostile, mixed, redis_like

pytest.importorskip("jinja2")


@given(st.floats(0, 1e12), st.floats(1e-6, 1e12))
def test_ticks_hold_the_values_and_are_few(low: float, width: float) -> None:
    width = max(width, low * 1e-6)
    ticks = nice_ticks(low, low + width)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + step * 1e-3
    assert ticks[-1] >= low + width - step * 1e-3
    assert 2 <= len(ticks) <= 12


def test_marks_that_coincide_stand_side_by_side() -> None:
    drawn = chart(
        "t",
        "s",
        [Series("a", [(1.0, 2.0, "one")]), Series("b", [(1.0, 2.0, "two"), (0.5, 2.0, "three")])],
        x_name="x",
        y_name="y",
    )
    (first,), (second, third) = (one.points for one in drawn.series)
    assert first.y == second.y == third.y
    assert 8 <= second.x - first.x <= 10
    assert drawn.series[0].mark != drawn.series[1].mark


def test_parts_of_a_bar_adjoin_and_the_longest_fills_the_scale() -> None:
    rows = [("a", [("o9", "2M", 30), ("o0", "4K", 10)]), ("b", [("o9", "2M", 20), ("o4", "64K", 0)])]
    drawn = bar_chart("t", "s", rows, legend=[("o9", "2M"), ("o4", "64K"), ("o0", "4K")], size=str)
    assert [(part.start, part.width) for part in drawn.bars[0].parts] == [(0, 750), (750, 250)]
    assert [(part.start, part.width) for part in drawn.bars[1].parts] == [(0, 500)]
    assert drawn.legend == (("o9", "2M"), ("o0", "4K"))


class Tags(HTMLParser):
    """The tags of a page, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_no_text_of_a_document_becomes_markup() -> None:
    bad = "<b onclick=x>'\"&{{1}}"
    document = Document(
        title=bad,
        verdict=bad,
        facts=[(bad, bad)],
        figures=[Figure(bad, bad, bad)],
        sections=[
            Section(
                bad,
                bad,
                bars=[bar_chart(bad, bad, [(bad, [("o9", bad, 1)])], legend=[("o9", bad)], size=lambda _: bad)],
                charts=[
                    chart(
                        bad,
                        bad,
                        [Series(bad, [(1, 1, bad)]), Series(bad, [(2, 1, bad)], joined=True)],
                        x_name=bad,
                        y_name=bad,
                        x_unit=bad,
                        y_unit=bad,
                    )
                ],
                tables=[ReportTable(bad, [bad], [[Cell(bad)]], bad), ReportTable(bad, [bad], [], folded=True)],
            )
        ],
        commands=[Command(bad, bad)],
        notes=[bad],
    )
    tags = Tags(html_of(document))
    assert not [tag for tag, attributes in tags.tags if tag in ("b", "script") or "onclick" in attributes]
    assert tags.text.count(bad) > 20


def test_names_of_a_hostile_process_stay_text() -> None:
    document = report_on(Source(hostile(), "then", arguments=HOSTILE[1]), PlanOptions(), [])
    tags = Tags(html_of(document))
    assert not {tag for tag, _ in tags.tags} & {"script", "img", "iframe", "a", "object"}
    assert not [name for _, attributes in tags.tags for name in attributes if name.startswith("on")]
    addresses = {value for _, attributes in tags.tags for name, value in attributes.items() if name in ("src", "href")}
    assert addresses == {"data:,"}


def test_a_report_says_what_it_is_about_and_how_to_repeat_it() -> None:
    document = report_on(Source(redis_like(), "at noon"), PlanOptions(max_ptes_none=64), [Command("again", "mthp x")])
    text = Tags(html_of(document)).text
    for wanted in ("4711 (redis-server)", "at noon", "Linux 6.18.44", "mthp x", "max_ptes_none 64", "[heap]"):
        assert wanted in text
    facts = dict(document.facts)
    assert facts["transparent_hugepage/enabled"] == "madvise"
    assert facts["khugepaged/max_ptes_none"] == "511"
    assert "arguments" not in facts


def test_a_process_without_memory_is_told_in_words() -> None:
    document = report_on(Source(FakeSpace([]), "then"), PlanOptions(), [])
    assert document.verdict.startswith("Nothing is resident")
    assert document.sections == ()
    html_of(document)


def test_a_process_that_was_wholly_swapped_out_before() -> None:
    vma, state, order = mixed(1 << 32, 2, 0.6)
    order[:] = ORDER_NONE
    before = FakeSpace([(vma, np.full_like(state, Pte.SWAP), order)])
    after = FakeSpace([mixed(1 << 32, 2, 0.6)])
    text = Tags(html_of(report_on(Source(before, "then", after), PlanOptions(), []))).text
    assert "from nothing resident" in text


def test_a_report_is_written_whole_and_replaces_nothing_unasked(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    document = Document("t", "v \udcff")
    assert write(document, path) == path.stat().st_size
    with pytest.raises(MthpError, match="exists already"):
        write(document, path)
    write(Document("other", "v"), path, overwrite=True)
    assert "other" in path.read_text("utf-8")
    assert list(tmp_path.iterdir()) == [path]
