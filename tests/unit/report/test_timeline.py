"""The part of a report on a recording."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from fakes import FakeSpace
from mthp.engine.select import PlanOptions
from mthp.ptes import Pte
from mthp.report import html_of
from mthp.report.gather import Source, report_on
from mthp.report.timeline import chosen_steps, gather, section
from report_spaces import mixed

START = 0x7F00_0000_0000


def grown(pages: int) -> FakeSpace:
    """Return a process with two huge PMD ranges at its start, and `pages` further pages."""
    vma, state, order = mixed(START, 8, 0.5)
    state[:], order[:] = 0, -1
    state[:1024], order[:1024] = Pte.PRESENT | Pte.PMD_MAPPED, 9
    state[1024 : 1024 + pages], order[1024 : 1024 + pages] = Pte.PRESENT, 0
    return FakeSpace([(vma, state, order)])


def test_coverage_and_memory_are_drawn_over_time() -> None:
    timeline = gather((2.0 * at, grown(pages)) for at, pages in enumerate((0, 512, 1024)))
    assert [(m.seconds, m.anonymous >> 12, m.huge >> 12, m.large >> 12) for m in timeline.moments] == [
        (0.0, 1024, 1024, 1024),
        (2.0, 1536, 1024, 1024),
        (4.0, 2048, 1024, 1024),
    ]
    part = section(timeline)
    coverage, memory = part.charts
    assert [point.text for point in coverage.series[0].points] == [
        "2M mapped after 0 s: 100.0%",
        "2M mapped after 2 s: 66.7%",
        "2M mapped after 4 s: 50.0%",
    ]
    assert memory.series[0].points[-1].text == "resident after 4 s: 8M"
    assert "from 4M to 8M" in part.lead
    (strip,) = part.maps[0].strips
    assert strip.after is not None
    assert "4M 4K pages" in strip.after.summary


def test_large_memory_is_counted_in_aligned_blocks() -> None:
    """A folio that is not mapped at a multiple of its size has smaller blocks, which the hardware uses."""
    vma, state, order = mixed(START, 1, 0.5)
    state[:], order[:] = 0, -1
    # A folio of order 1 at an odd page.
    state[1:3], order[1:3] = Pte.PRESENT, 1
    timeline = gather([(0.0, FakeSpace([(vma, state, order)]))])
    assert [(moment.anonymous >> 12, moment.large) for moment in timeline.moments] == [(2, 0)]
    assert section(timeline).charts[0].series[1].name == "in aligned blocks above 4K"


def test_one_step_is_a_recording_too() -> None:
    timeline = gather([(0.0, grown(3))], "it was cut off")
    page = html_of(report_on(Source(grown(3), "then", timeline=timeline), PlanOptions(), []))
    assert "it was cut off" in page
    assert "Coverage over time" in page


@given(st.integers(1, 5000), st.integers(2, 200))
def test_long_recordings_are_thinned_out_evenly(count: int, most: int) -> None:
    chosen = chosen_steps(count, most)
    assert chosen[0] == 0
    assert chosen[-1] == count - 1
    assert len(chosen) == min(count, most)
    gaps = [after - before for before, after in itertools.pairwise(chosen)]
    assert max(gaps, default=1) - min(gaps, default=1) <= 1
