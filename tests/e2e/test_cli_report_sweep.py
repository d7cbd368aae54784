"""The table of a sweep, summed up and reported on."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.helpers import mthp
from mthp.geometry import GEOMETRIES, X86_64
from mthp.lab import swept
from mthp.lab.compare import compare, settings_of
from mthp.snapshot import load, record
from report_spaces import redis_like


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sweep")
    inputs = directory / "inputs"
    inputs.mkdir()
    for name in ("one", "two"):
        record(redis_like(), inputs / f"{name}.parquet")
    grid, table = directory / "grid.toml", directory / "table.parquet"
    grid.write_text('policies = ["mainline", "per-order"]\nmax_ptes_none = [64, 511]\nscans = "all"\n')
    done = mthp("sweep", inputs, "--grid", grid, "-o", table, "--jobs", 1)
    assert done.returncode == 0, done.stderr
    return table


def test_two_equal_inputs_sum_up_to_twice_one(sweep: Path) -> None:
    assert swept.is_sweep(sweep)
    rows = swept.read(sweep)
    assert swept.geometry_of(rows) == X86_64
    sums = {(row["setting"], row["scan"]): row for row in swept.summed(rows)}
    with load(sweep.parent / "inputs" / "one.parquet") as space:
        alone = compare(space, settings_of(["mainline", "per-order"], max_ptes_none=[64, 511]), scans=None)
    for row in alone.rows:
        both = sums[row["setting"], row["scan"]]
        for key in ("resident_bytes", "bloat_bytes", "copied_bytes", "creep_bytes"):
            assert both[key] == 2 * row[key]
        for key in ("huge_coverage", "large_coverage", "order_share_9"):
            assert both[key] == pytest.approx(row[key])


def test_a_sweep_becomes_a_page(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep.html"
    done = mthp("report", sweep, "-o", out)
    assert done.returncode == 0, done.stderr
    text = out.read_text("utf-8")
    for wanted in (
        "table.parquet: a sweep",
        "Over 2 inputs together",
        "Coverage against bloat",
        "Spread of the inputs",
    ):
        assert wanted in text


def test_what_is_no_sweep_is_not_taken_for_one(sweep: Path, tmp_path: Path) -> None:
    assert not swept.is_sweep(sweep.parent / "inputs" / "one.parquet")
    assert not swept.is_sweep(tmp_path / "nowhere")


def test_the_geometry_is_told_by_the_orders() -> None:
    geometry = GEOMETRIES["arm64-16k"]
    labels = ",".join(geometry.label(order) for order in geometry.anon_orders)
    row = {"orders": labels} | {f"order_share_{order}": 0.0 for order in range(geometry.pmd_order + 1)}
    assert swept.geometry_of([row]) == geometry
