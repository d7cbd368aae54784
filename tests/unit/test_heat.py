"""Heat: spans of any kind, what blocks are worth, files of heat from anywhere, and hot memory first."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes import FakeSpace, page_runs
from mthp.abilities import heat_of
from mthp.budget import Amount
from mthp.engine.allowed import allowed_of
from mthp.engine.collapse import collapse_space
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.errors import UnsupportedError, UsageError
from mthp.geometry import X86_64
from mthp.heat import Heat, HeatRequest, parse_heat, parse_measured, worth
from mthp.heatfile import HEAT_BYTES, HEAT_SPANS, read_heat
from mthp.lab.compare import compare, settings_of
from mthp.lab.heated import drawn_by
from mthp.means import Means
from mthp.ptes import Pte
from mthp.sim import Machine
from mthp.snapshot import Pace, record, record_series
from mthp.snapshot.description import Description
from mthp.snapshot.record import describe
from mthp.targets import open_target
from mthp.vma import Vma

BASE = 1 << 40
PMD = X86_64.pmd_size
SPANS = st.lists(
    st.tuples(st.integers(0, 1 << 12), st.integers(1, 1 << 8), st.floats(0, 1e6)).map(
        lambda span: (span[0], span[0] + span[1], span[2])
    ),
    max_size=20,
)


def heat(*spans: tuple[int, int, float]) -> Heat:
    start, end = (np.array([span[index] for span in spans], np.uint64) for index in (0, 1))
    return Heat.of_spans(start, end, np.array([span[2] for span in spans], np.float64))


def ranges(*bounds: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([start for start, _ in bounds], np.uint64), np.array([end for _, end in bounds], np.uint64)


@given(SPANS, st.integers(0, 1 << 13), st.integers(0, 1 << 13))
def test_accesses_add_up_byte_by_byte(spans: list[tuple[int, int, float]], one: int, other: int) -> None:
    low, high = sorted((one, other))
    expected = sum(
        count * max(0, min(high, end) - max(low, start)) / (end - start) for start, end, count in spans if count
    )
    found = heat(*spans)
    assert found.within(*ranges((low, high)))[0] == pytest.approx(expected, rel=1e-6, abs=1e-3)
    assert found.total == pytest.approx(sum(count for *_, count in spans), rel=1e-6, abs=1e-3)
    assert (found.start[1:] >= found.end[:-1]).all()
    assert (found.accesses > 0).all()


@given(SPANS, st.integers(1, 5))
def test_a_coarser_heat_has_the_same_accesses(spans: list[tuple[int, int, float]], most: int) -> None:
    found = heat(*spans).coarser(most)
    assert found.spans <= most
    assert found.total == pytest.approx(heat(*spans).total)


def test_a_block_is_worth_its_accesses_for_each_page_copied() -> None:
    assert worth(np.array([8.0, 8.0, 8.0, 0.0]), np.array([4, 1, 0, 4])).tolist() == [6.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("text", "request_"),
    [
        ("5s", HeatRequest("auto", 5.0)),
        ("damon:250ms", HeatRequest("damon", 0.25)),
        ("hot.csv", HeatRequest(path="hot.csv")),
        ("1.csv", HeatRequest(path="1.csv")),
        ("2026.11.29.json", HeatRequest(path="2026.11.29.json")),
        ("./5s", HeatRequest(path="./5s")),
        (Path("5s.csv"), HeatRequest(path="5s.csv")),
    ],
)
def test_a_source_of_heat_is_a_time_or_a_file(text: object, request_: HeatRequest) -> None:
    assert parse_heat(text) == request_


@pytest.mark.parametrize("text", ["", "0s", "damon:0s", "601s", "99999h", "a\0b", 5])
def test_what_is_neither_a_time_nor_a_file_is_refused(text: object) -> None:
    with pytest.raises(UsageError):
        parse_heat(text)


def test_a_rule_takes_no_file() -> None:
    assert parse_measured("idle:3s") == HeatRequest("idle", 3.0)
    with pytest.raises(UsageError):
        parse_measured("hot.csv")


def test_a_file_of_csv_and_one_of_json_say_the_same(tmp_path: Path) -> None:
    csv, lines = tmp_path / "heat.csv", tmp_path / "heat.jsonl"
    csv.write_text("start,end,accesses\n# by hand\n0x1000, 0x3000, 4\n\n12288,16384,1.5\n")
    lines.write_text(
        '{"start": "0x1000", "end": 12288, "accesses": 4}\n{"start": 12288, "end": 16384, "accesses": 1.5}'
    )
    for path in (csv, lines):
        found = read_heat(path)
        assert (found.start.tolist(), found.end.tolist()) == ([0x1000, 0x3000], [0x3000, 0x4000])
        assert found.accesses.tolist() == [4.0, 1.5]
        assert path.name in found.source


@pytest.mark.parametrize(
    "line",
    [
        b"\xff\xfe\x00binary",
        b"1,2",
        b"1,2,3,4",
        b"2,1,1",
        b"1,1,1",
        b"-4096,4096,1",
        b"0,4096,-1",
        b"0,4096,nan",
        b"0,4096,1e999",
        b"0,0x1ffffffffffffffff,1",
        b"0,9223372036854775809,1",
        b'{"start": 0, "end": 4096}',
        b'{"start": 0, "end": 4096, "accesses": true}',
        b'{"start": 0.5, "end": 4096, "accesses": 1}',
        b'{"start": 0, "end": 4096, "accesses": 1' + b"0" * 2000 + b"}",
        b"[" * 900,
        b"x" * 5000,
    ],
)
def test_a_line_that_makes_no_sense_is_named(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "heat"
    path.write_bytes(b"0,4096,1\n" + line)
    with pytest.raises(UsageError, match=r"heat: line 2: ") as caught:
        read_heat(path)
    assert len(caught.value.message) < 400
    assert caught.value.message.isprintable()


def test_a_file_is_read_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "heat"
    with pytest.raises(UsageError, match="cannot be read") as caught:
        read_heat(path)
    assert "a time such as 5s" in caught.value.help
    path.write_text("# nothing\n")
    with pytest.raises(UsageError, match="no heat in it"):
        read_heat(path)
    path.write_text("0,1,1\n" * (HEAT_SPANS.most + 1))
    with pytest.raises(UsageError, match=f"spans of heat: {HEAT_SPANS.most + 1:,}"):
        read_heat(path)
    os.truncate(path, HEAT_BYTES.most + 1)
    with pytest.raises(UsageError, match="bytes of heat: more"):
        read_heat(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_are_heat_or_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "heat"
    path.write_bytes(data)
    with contextlib.suppress(UsageError):
        assert read_heat(path).total >= 0


# Hot memory first.


def space_of(*fullness: int) -> FakeSpace:
    runs: list[tuple[int, int, int]] = []
    for pages in fullness:
        runs += [(pages, Pte.PRESENT, 0), (512 - pages, 0, -1)]
    return FakeSpace([(Vma(BASE, BASE + len(fullness) * PMD, "rw-p"), *page_runs(*runs))])


def hot(*accesses: float) -> Heat:
    return heat(*((BASE + at * PMD, BASE + (at + 1) * PMD, count) for at, count in enumerate(accesses)))


def test_hot_ranges_come_first_and_cold_ones_by_how_full_they_are() -> None:
    space = space_of(512, 500, 400, 510)
    report = collapse_space(space, PlanOptions(policy="pmd-only", heat=hot(0, 0, 3, 0)), Means(max_bloat=None))
    assert [(address - BASE) // PMD for address, _ in space.attempts] == [2, 0, 3, 1]
    assert report.heat_share == report.plan.heat_share == 1.0


def test_a_budget_of_copying_goes_to_what_is_hot() -> None:
    space = space_of(512, 512, 512, 512)
    chosen = PlanOptions(policy="pmd-only", heat=hot(1, 9, 0, 2))
    means = Means(max_copied=Amount(share=0.5))
    allowed = allowed_of(space, plan_space(space, chosen), means)
    report = collapse_space(space, chosen, means)
    assert [(address - BASE) // PMD for address, _ in space.attempts] == [1, 3]
    assert (report.ranges.made, report.ranges.over_copied, report.copied_bytes) == (2, 2, 2 * PMD)
    assert report.heat_share == pytest.approx(11 / 12)
    assert not report.complete
    assert allowed.folios_by_order == {9: 2}
    assert [left.count for left in allowed.left] == [2]
    assert "--max-copied 50%" in allowed.left[0].reason


def test_without_heat_a_plan_says_that_none_was_seen() -> None:
    assert plan_space(space_of(512), PlanOptions()).heat_share is None
    assert plan_space(space_of(512), PlanOptions(heat=hot(0))).heat_share is None


def test_a_space_that_is_not_live_takes_heat_of_a_file_only(tmp_path: Path) -> None:
    path = tmp_path / "heat.csv"
    path.write_text(f"{BASE},{BASE + PMD},7\n")
    found = heat_of(space_of(512), str(path))
    assert found is not None
    assert found.total == 7.0
    with pytest.raises(UnsupportedError, match="not a live process"):
        plan_space(space_of(512), PlanOptions(heat="5s"))


def test_the_kernels_khugepaged_keeps_to_no_budget_of_copying() -> None:
    with pytest.raises(UsageError, match="budget for copying"):
        collapse_space(space_of(512), PlanOptions(), Means("khugepaged", max_copied=PMD, max_bloat=None))


def test_splits_begin_with_the_range_that_is_worth_most_for_each_page_however_many_blocks_others_have() -> None:
    machine = Machine()
    mm, page = machine.create_mm(), machine.geometry.page_size
    machine.map(mm, PMD, 4 * PMD)
    # A full block, four full blocks, and one with 10 of 16 pages, which is the hottest by the page.
    for start, pages in ((PMD, 16), (2 * PMD, 64), (3 * PMD, 10)):
        machine.populate(mm, start, start + pages * page)
    spans = ((PMD, 1.0), (2 * PMD, 20.0), (3 * PMD, 9.0))
    seen = heat(*((start, start + (64 if start == 2 * PMD else 16) * page, count) for start, count in spans))
    chosen = PlanOptions(policy="per-order", orders="64K", max_ptes_none=255, heat=seen)
    space = machine.space(machine.parts.mms[mm.id])
    report = collapse_space(space, chosen, Means("split", max_bloat=None, max_copied=16 * page))
    assert report.folios[4].made == 1
    assert space.read([(3 * PMD, 3 * PMD + page)]).folio_order.tolist() == [4]


def test_the_share_of_a_processor_is_that_of_the_time_it_took() -> None:
    nowhere = np.empty(0, np.uint64)
    measured = Heat(nowhere, nowhere, np.empty(0), seconds=5.0, cpu_seconds=0.1)
    assert measured.cpu_share == pytest.approx(0.02)


# Heat in files, and in the model of the TLB.


def test_a_description_keeps_heat_and_one_without_reads_as_before() -> None:
    plain = describe(space_of(512), ())
    kept = Description.from_json(describe(space_of(512), (), hot(1, 0, 2.5)).to_json())
    assert Description.from_json(plain.to_json()).heat is None
    assert kept.heat is not None
    assert kept.heat.accesses.tolist() == [1.0, 2.5]
    assert kept.heat.start.tolist() == [BASE, BASE + 2 * PMD]


@pytest.mark.parametrize(
    "heat_",
    [
        5,
        {},
        {"start": [0], "end": [0], "accesses": [1]},
        {"start": [0], "end": [4096], "accesses": [-1]},
        {"start": [0], "end": [4096], "accesses": [1, 2]},
        {"start": [True], "end": [4096], "accesses": [1]},
        {"start": [0], "end": [1 << 70], "accesses": [1]},
        {"start": [0], "end": [4096], "accesses": ["1"]},
    ],
)
def test_a_description_with_heat_that_makes_no_sense_is_damaged(heat_: object) -> None:
    data = json.loads(describe(space_of(512), ()).to_json())
    more = {"source": "x", "seconds": 1, "cpu_seconds": 0, "remark": ""}
    with pytest.raises(UsageError, match="damaged"):
        Description.from_data(data | {"heat": heat_ | more if isinstance(heat_, dict) else heat_})


def test_a_comparison_weighs_page_walks_by_heat() -> None:
    space = space_of(512, 512, 512, 512, 512, 512, 512, 512)
    pmd_only = settings_of(["pmd-only"])
    plain = compare(space, pmd_only)
    weighed = compare(space, pmd_only, heat=hot(0, 0, 0, 1))
    assert plain.misses_before is None
    assert weighed.misses_before is not None
    # All goes to 512 pages, which fit into the last level.
    assert weighed.misses_before.walks == 512
    assert weighed.misses[0].walks == 1
    assert "random accesses by heat from a file that go to" in weighed.verdict[-1]
    assert "trace" not in weighed.verdict[-1]


def test_accesses_for_the_model_of_the_tlb_are_drawn_as_often_as_heat_says() -> None:
    [pages] = drawn_by(space_of(512, 512, 256), hot(1, 9, 2))()
    # Half of the last range is not there, so half of its accesses are left out.
    shares = np.bincount((pages * 4096 - BASE) // PMD, minlength=3) / len(pages)
    assert shares == pytest.approx(np.array([1, 9, 1]) / 11, abs=0.01)


@pytest.mark.parametrize(("accesses", "served"), [((9, 1, 0), 0.9), ((1, 9, 0), 0.1), ((0, 0, 5), 0.0)])
def test_a_comparison_weighs_coverage_by_heat(accesses: tuple[float, ...], served: float) -> None:
    """The first range alone becomes huge, whichever is used."""
    space, choice = space_of(512, 300, 300), settings_of(["pmd-only"], max_ptes_none=[0])
    result = compare(space, choice, heat=hot(*accesses), walks=False)
    before, after = result.rows
    assert (before["hot_coverage"], after["hot_coverage"]) == (0.0, pytest.approx(served))
    assert f"Of the observed accesses, 0.0% go to memory mapped as 2M now; {served:.1%} (pmd-only)." in result.verdict
    assert "tlb_misses" not in after
    assert compare(space, choice).rows[-1]["hot_coverage"] is None


def test_heat_outside_of_what_may_be_collapsed_counts_as_not_served() -> None:
    seen = heat((BASE, BASE + PMD, 1.0), (BASE + 4 * PMD, BASE + 5 * PMD, 3.0))
    [_, after] = compare(space_of(512), settings_of(["pmd-only"]), heat=seen, walks=False).rows
    assert after["hot_coverage"] == pytest.approx(0.25)


@pytest.mark.parametrize("series", [False, True])
def test_what_is_recorded_keeps_its_heat_and_is_ranked_and_weighed_by_it(tmp_path: Path, series: bool) -> None:
    seen, path = hot(0, 1, 8), tmp_path / "recorded"
    if series:
        record_series(space_of(512, 512, 512), path, Pace(every=0.01, duration=0.02), heat=seen)
    else:
        record(space_of(512, 512, 512), path, heat=seen)
    with open_target(str(path)) as space:
        kept, plan = heat_of(space), plan_space(space, PlanOptions(policy="pmd-only"))
        first = [(address - BASE) // PMD for address in plan.ranked(plan.folios).address.tolist()]
        result = compare(space, settings_of(["pmd-only"]), walks=False)
    assert kept is not None
    assert kept.accesses.tolist() == [1.0, 8.0]
    assert first == [2, 1, 0]
    assert result.heat is kept
    assert result.rows[-1]["hot_coverage"] == 1.0
