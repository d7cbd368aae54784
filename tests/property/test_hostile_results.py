"""Altered results: `mthp report` refuses or shows them, with no more memory than for a result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes import FakeSpace, page_runs
from hostile import JUNK, altered, bomb, damaged, refuses
from mthp.cli import main
from mthp.errors import UsageError
from mthp.ptes import Pte
from mthp.vma import Vma

pytest.importorskip("pyarrow")
pytest.importorskip("jinja2")
pytest.importorskip("joblib")
import pyarrow as pa
import pyarrow.parquet as pq

from mthp.lab import simulated, swept
from mthp.lab.grid import Grid
from mthp.lab.runners import local
from mthp.lab.sweep import sweep
from mthp.report import write
from mthp.report.comparisons import report_on_comparison
from mthp.report.simulations import report_on_simulation
from mthp.report.sweeps import report_on_sweep
from mthp.snapshot import record
from strategies import examples

BASE = 0x7F00_0000_0000
EXAMPLES = settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("results")
    space = FakeSpace([(Vma(BASE, BASE + (4 << 20), "rw-p"), *page_runs((600, Pte.PRESENT, 0), (424, 0, -1)))])
    record(space, directory / "one.parquet")
    scenario = 'duration = "2s"\n[machine]\nmemory = "64M"\n[[process]]\nworkload = "redis"\nmemory = "8M"\n'
    (directory / "scenario.toml").write_text(scenario)
    grid = Grid(policies=("mainline", "rfc"), max_ptes_none=(0, 511), scans=2)
    sweep([("one", directory / "one.parquet")], grid, directory / "sweep", local(1))
    assert main(["simulate", str(directory / "scenario.toml"), "-o", str(directory / "simulated")]) == 0
    return directory


@pytest.fixture(scope="module")
def comparison(inputs: Path) -> Any:
    from contextlib import redirect_stdout
    from io import StringIO

    with redirect_stdout(StringIO()) as out:
        assert main(["compare", str(inputs / "one.parquet"), "--scans", "2", "--json"]) == 0
    return json.loads(out.getvalue())


def reported(path: Path, page: Path) -> None:
    """What `mthp report` does with a result, or a refusal."""
    try:
        if simulated.is_simulated(path):
            found = simulated.read(path)
            document = report_on_simulation(found.rows, found.about, [])
        elif swept.is_sweep(path):
            rows = swept.read(path)
            document = report_on_sweep(path, rows, swept.summed(rows), swept.geometry_of(rows), [])
        else:
            document = report_on_comparison(path, [])
        write(document, page, overwrite=True)
    except UsageError as error:
        refuses(error)


def test_what_is_whole_is_reported(inputs: Path, comparison: Any, tmp_path: Path) -> None:
    (tmp_path / "compare.json").write_text(json.dumps(comparison))
    for path in (inputs / "sweep", inputs / "simulated", tmp_path / "compare.json"):
        assert main(["report", str(path), "-o", str(tmp_path / f"{path.name}.html")]) == 0


@EXAMPLES
@given(st.data())
def test_a_comparison_that_was_altered(comparison: Any, tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "compare.json").write_text(
        json.dumps(data.draw(altered({**comparison, "rows": comparison["rows"][:3]})))
    )
    reported(tmp_path / "compare.json", tmp_path / "page.html")


TEXTS = st.sampled_from(["", "x", "2M", "9" * 400, "order_share_9", "\ud7ff", "16K,64K", ",", "1E", "-1"])
FLOATS = st.sampled_from([0.0, -1.0, 1e308, -1e308, float("nan"), float("inf"), 0.5, 1e-308])
INTEGERS = st.sampled_from([0, 1, -1, 2**31, 2**62, 2**63 - 1, -(2**63), 1000, 1001])


@EXAMPLES
@given(st.data())
@pytest.mark.parametrize("name", ["sweep", "simulated"])
def test_a_table_that_was_altered(inputs: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    table = pq.read_table(inputs / name)
    for _ in range(data.draw(st.integers(1, 3))):
        index = data.draw(st.integers(0, table.num_columns - 1))
        field, kept = table.schema.field(index), st.sampled_from(table.column(index).to_pylist())
        values = TEXTS if field.type == pa.string() else FLOATS if field.type == pa.float64() else INTEGERS
        column = data.draw(st.lists(kept | values | st.none(), min_size=len(table), max_size=len(table)))
        how = data.draw(st.sampled_from(["values", "values", "kind", "name", "drop"]))
        if how == "drop":
            table = table.drop_columns([field.name])
        elif how == "name":
            table = table.rename_columns(
                [f"order_share_{each}" if each == field.name else each for each in table.column_names]
            )
        elif how == "kind":
            table = table.set_column(index, field.name, pa.array([str(value) for value in column]))
        else:
            table = table.set_column(index, field.name, pa.array(column, field.type))
    pq.write_table(table, tmp_path / "altered")
    reported(tmp_path / "altered", tmp_path / "page.html")


@EXAMPLES
@given(st.data())
@pytest.mark.parametrize("name", ["sweep", "simulated"])
def test_bytes_of_a_table(inputs: Path, tmp_path: Path, name: str, data: st.DataObject) -> None:
    (tmp_path / "damaged").write_bytes(data.draw(damaged((inputs / name).read_bytes())))
    reported(tmp_path / "damaged", tmp_path / "page.html")


@EXAMPLES
@given(st.data())
def test_what_is_told_beside_a_simulation(inputs: Path, tmp_path: Path, data: st.DataObject) -> None:
    table = pq.read_table(inputs / "simulated")
    told = data.draw(altered(json.loads(table.schema.metadata[simulated.KEY])) | JUNK)
    pq.write_table(table.replace_schema_metadata({simulated.KEY: json.dumps(told)}), tmp_path / "altered")
    reported(tmp_path / "altered", tmp_path / "page.html")


@pytest.mark.slow
def test_a_text_that_every_row_repeats(inputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep"
    table = pq.read_table(inputs / "sweep")
    many = pa.concat_tables([table.slice(0, 1)] * 20_000)
    texts = pa.DictionaryArray.from_arrays(np.zeros(len(many), np.int32), pa.array(["x" * (1 << 20)]))
    many = many.set_column(many.column_names.index("target"), "target", texts)
    pq.write_table(many, path)
    assert path.stat().st_size < 4 << 20
    assert "bytes of text" in bomb(path, "report", path, "-o", tmp_path / "page.html")


@pytest.mark.slow
def test_many_rows(inputs: Path, tmp_path: Path) -> None:
    path = tmp_path / "sweep"
    table = pq.read_table(inputs / "sweep").slice(0, 1)
    many = table.take(pa.array(np.zeros(1 << 20, np.int64)))
    pq.write_table(many, path, compression="zstd")
    assert path.stat().st_size < 4 << 20
    assert "cells of a table" in bomb(path, "report", path, "-o", tmp_path / "page.html")
