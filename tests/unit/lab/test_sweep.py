"""Sweeps: the table, bad inputs among good ones, and going on after an interruption."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import numpy as np
import pytest

from fakes import FakeSpace, page_runs
from mthp.errors import MthpError, UsageError
from mthp.heat import Heat
from mthp.lab import sweep as sweep_module
from mthp.lab import swept
from mthp.lab.evaluate import evaluate
from mthp.lab.grid import Grid
from mthp.lab.runners import dask, local
from mthp.lab.sweep import Done, Task, inputs_in, measure, sweep
from mthp.ptes import ORDER_NONE, Pte
from mthp.snapshot import Pace, record, record_series
from mthp.snapshot.fromtrace import record_trace
from mthp.vma import Vma

pytest.importorskip("pyarrow")
pytest.importorskip("joblib")

P = int(Pte.PRESENT)
BASE = 0x7F00_0000_0000
GRID = Grid(policies=("mainline", "no-creep", "per-order"), max_ptes_none=(0, 256), scans=None)


def space_of(seed: int) -> FakeSpace:
    rng = np.random.default_rng(seed)
    there = np.repeat(rng.random(64 * 3) < rng.uniform(0.4, 0.95), 8)
    state, order = np.where(there, np.uint16(P), np.uint16(0)), np.where(there, np.int8(0), np.int8(ORDER_NONE))
    return FakeSpace([(Vma(BASE, BASE + 3 * (2 << 20), "rw-p"), state, order)], label=f"{seed} (fake)")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "inputs"
    (path / "more").mkdir(parents=True)
    for seed in range(4):
        record(space_of(seed), path / f"{seed}.parquet")
    record(space_of(9), path / "more" / "9.parquet")
    record_series(space_of(5), path / "5.rec", Pace(every=0.01, duration=0.025))
    return path


def rows_of(path: Path) -> list[dict[str, object]]:
    import pyarrow.parquet as pq

    rows: list[dict[str, object]] = pq.read_table(path).to_pylist()
    return rows


def test_the_table_has_what_evaluate_gives(directory: Path, tmp_path: Path) -> None:
    report = sweep(inputs_in(directory), GRID, tmp_path / "out.parquet", local(1))
    assert (report.inputs, report.done, report.settings, report.failed) == (6, 6, 6, {})
    rows = rows_of(tmp_path / "out.parquet")
    assert report.rows == len(rows)
    assert [row["input"] for row in rows] == sorted(str(row["input"]) for row in rows)
    expected = [row for outcome in evaluate(space_of(2), GRID.settings(), scans=None) for row in outcome.rows()]
    got = [row for row in rows if row["input"] == "2.parquet"]
    assert len(got) == len(expected)
    for mine, theirs in zip(got, expected, strict=True):
        assert {key: mine[key] for key in theirs} == theirs
    assert not (tmp_path / "out.parquet.parts").exists()


def test_duckdb_reads_the_table(directory: Path, tmp_path: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    sweep(inputs_in(directory), GRID, tmp_path / "out.parquet", local(1))
    query = f"select policy, max(bloat_bytes) from '{tmp_path}/out.parquet' where max_ptes_none = 0 group by 1"
    assert dict(duckdb.sql(query).fetchall()) == {"mainline": 0, "no-creep": 0, "per-order": 0}


def test_processes_give_the_same_bytes(directory: Path, tmp_path: Path) -> None:
    sweep(inputs_in(directory), GRID, tmp_path / "one.parquet", local(1))
    sweep(inputs_in(directory), GRID, tmp_path / "two.parquet", local(2))
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_bad_inputs_are_reported_and_end_nothing(directory: Path, tmp_path: Path) -> None:
    (directory / "notes.txt").write_text("no snapshot")
    whole = (directory / "1.parquet").read_bytes()
    (directory / "1.parquet").write_bytes(whole[: len(whole) // 2])
    (directory / "5.rec").write_bytes((directory / "5.rec").read_bytes()[:700])
    report = sweep(inputs_in(directory), GRID, tmp_path / "out.parquet", local(1))
    assert list(report.failed) == ["1.parquet", "5.rec", "notes.txt"]
    assert "not a snapshot" in report.failed["notes.txt"]
    assert report.done == 4
    assert {row["input"] for row in rows_of(tmp_path / "out.parquet")} == {
        "0.parquet",
        "2.parquet",
        "3.parquet",
        "more/9.parquet",
    }


def test_only_bad_inputs_give_an_empty_table(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("no snapshot")
    report = sweep(inputs_in(tmp_path / "in"), GRID, tmp_path / "out.parquet", local(1))
    assert (report.rows, report.done, len(report.failed)) == (0, 0, 1)
    assert rows_of(tmp_path / "out.parquet") == []


class Counted:
    """A runner that counts, and may fail after some tasks."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.ran: list[str] = []
        self._fail_after = fail_after

    def __call__(self, tasks: Sequence[Task]) -> Generator[Done, None, None]:
        for task in tasks:
            if len(self.ran) == self._fail_after:
                raise MthpError("the scheduler went away")
            self.ran.append(task.name)
            yield measure(task)


def test_goes_on_where_it_was(directory: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.parquet"
    sweep(inputs_in(directory), GRID, whole, local(1))
    out = tmp_path / "out.parquet"
    with pytest.raises(MthpError, match="went away"):
        sweep(inputs_in(directory), GRID, out, Counted(fail_after=2))
    assert not out.exists()
    stops = iter([False, True])
    second = Counted()
    report = sweep(inputs_in(directory), GRID, out, second, stop=lambda: next(stops))
    assert (report.interrupted, report.resumed, report.done, report.path) == (True, 2, 4, "")
    third = Counted()
    report = sweep(inputs_in(directory), GRID, out, third)
    assert (report.interrupted, report.resumed, report.done) == (False, 4, 6)
    assert len(second.ran) == len(third.ran) == 2
    assert out.read_bytes() == whole.read_bytes()


def test_an_input_or_grid_that_changed_is_done_again(directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    with pytest.raises(MthpError):
        sweep(inputs_in(directory), GRID, out, Counted(fail_after=5))
    record(space_of(77), directory / "0.parquet", overwrite=True)
    runner = Counted()
    sweep(inputs_in(directory), GRID, out, runner)
    assert runner.ran == ["0.parquet", "more/9.parquet"]
    with pytest.raises(MthpError):
        sweep(inputs_in(directory), GRID, tmp_path / "other.parquet", Counted(fail_after=5))
    runner = Counted()
    sweep(inputs_in(directory), Grid(policies=("rfc",)), tmp_path / "other.parquet", runner)
    assert len(runner.ran) == 6


def test_every_step_of_a_recording(directory: Path, tmp_path: Path) -> None:
    sweep(inputs_in(directory), Grid(policies=("rfc",), steps="all"), tmp_path / "out.parquet", local(1))
    steps = {row["step"] for row in rows_of(tmp_path / "out.parquet") if row["input"] == "5.rec"}
    assert len(steps) >= 2
    assert steps == set(range(len(steps)))


def test_targets_of_different_geometry_fit_in_one_table(directory: Path, tmp_path: Path) -> None:
    from mthp.geometry import geometry_named

    geometry = geometry_named("ppc64-64k")
    state, order = page_runs((32, P, 0))
    vma = Vma(BASE, BASE + geometry.pmd_size, "rw-p")
    record(FakeSpace([(vma, state, order)], geometry=geometry), directory / "ppc.parquet")
    report = sweep(inputs_in(directory), Grid(policies=("mainline",)), tmp_path / "out.parquet", local(1))
    assert report.failed == {}
    [after] = [row for row in rows_of(tmp_path / "out.parquet") if row["input"] == "ppc.parquet" and row["scan"] == 1]
    assert after["order_share_5"] == 1.0
    assert after["order_share_9"] is None


def test_inputs_are_weighed_by_their_heat_and_only_those_that_have_it(tmp_path: Path) -> None:
    """The same memory, of which the first range alone may become huge, used in one of two places."""
    (tmp_path / "in").mkdir()
    state = np.full(2 * 512, P, np.uint16)
    state[600:] = 0
    order = np.where(state == P, np.int8(0), np.int8(ORDER_NONE))
    space = FakeSpace([(Vma(BASE, BASE + (4 << 20), "rw-p"), state, order)])
    starts = np.array([BASE, BASE + (2 << 20)], np.uint64)
    for name, accesses in (("a first", (3.0, 1.0)), ("b second", (0.0, 4.0))):
        heat = Heat.of_spans(starts, starts + np.uint64(88 * 4096), np.array(accesses))
        record(space, tmp_path / "in" / f"{name}.parquet", heat=heat)
    record(space, tmp_path / "in" / "c none.parquet")
    grid = Grid(policies=("pmd-only",), max_ptes_none=(0,), processor="skylake")
    out = tmp_path / "out.parquet"
    sweep(inputs_in(tmp_path / "in"), grid, out, local(1))
    rows = rows_of(out)
    assert [row["hot_coverage"] for row in rows] == [0.0, 0.75, 0.0, 0.0, None, None]
    # 88 pages in each place: one entry maps the first range afterwards, and 1536 entries hold all.
    assert [row["tlb_misses"] for row in rows] == [176, 89, 88, 88, None, None]
    sums = {row["scan"]: row for row in swept.summed(swept.read(out))}
    assert sums[1]["hot_coverage"] == pytest.approx(0.375)
    assert (sums[0]["tlb_misses"], sums[1]["tlb_misses"]) == (264, 177)
    sweep(inputs_in(tmp_path / "in"), Grid(policies=("pmd-only",)), tmp_path / "plain.parquet", local(1))
    assert "tlb_misses" not in rows_of(tmp_path / "plain.parquet")[0]


def test_recordings_of_traces_are_weighed_by_the_trace(tmp_path: Path) -> None:
    """A trace that goes through 4M in turn: as many walks as base pages, and one for each huge page."""
    (tmp_path / "in").mkdir()
    (tmp_path / "trace").write_text("".join(f" L {BASE + at * 4096:x},8\n" for at in range(1024)))
    record_trace(tmp_path / "trace", tmp_path / "in" / "a traced.rec")
    record_series(space_of(5), tmp_path / "in" / "b plain.rec", Pace(every=0.01, duration=0.01))
    for steps in ("last", "all"):
        grid = Grid(policies=("pmd-only",), max_ptes_none=(0,), processor="skylake", steps=steps)
        sweep(inputs_in(tmp_path / "in"), grid, tmp_path / f"{steps}.parquet", local(1))
        rows = [row for row in rows_of(tmp_path / f"{steps}.parquet") if row["scan"] == 1]
        assert {row["tlb_misses"] for row in rows if row["input"] == "b plain.rec"} == {None}
        assert [row["tlb_misses"] for row in rows if row["input"] == "a traced.rec"][-1] == 2


def test_a_planted_directory_of_parts_is_refused(directory: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("precious")
    parts = tmp_path / "out.parquet.parts"
    parts.symlink_to(precious)
    with pytest.raises(UsageError, match="cannot be created"):
        sweep(inputs_in(directory), GRID, tmp_path / "out.parquet", local(1))
    assert (precious / "file").read_text() == "precious"
    parts.unlink()
    parts.mkdir(0o700)
    parts.chmod(0o777)
    with pytest.raises(UsageError, match="others may write"):
        sweep(inputs_in(directory), GRID, tmp_path / "out.parquet", local(1))


def test_a_part_that_was_cut_short_is_done_again_and_other_files_stay(directory: Path, tmp_path: Path) -> None:
    inputs = inputs_in(directory)
    sweep(inputs, GRID, tmp_path / "out.parquet", local(1), stop=lambda: True)
    [part] = (tmp_path / "out.parquet.parts").iterdir()
    part.write_bytes(part.read_bytes()[:100])
    (part.parent / "notes").write_text("mine")
    report = sweep(inputs, GRID, tmp_path / "out.parquet", local(1))
    assert (report.resumed, report.done, report.failed) == (0, 6, {})
    assert [path.name for path in part.parent.iterdir()] == ["notes"]


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not a directory"):
        inputs_in(tmp_path / "no")
    with pytest.raises(UsageError, match="nothing is in"):
        inputs_in(tmp_path)
    with pytest.raises(UsageError, match="0 jobs"):
        local(0)
    with pytest.raises(UsageError, match="not the address"):
        dask("localhost")
    assert sweep_module.PARTS_SUFFIX == ".parts"
