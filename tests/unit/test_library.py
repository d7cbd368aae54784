"""The library as others use it: verbs, tables of other libraries, memory by other protocols, a picture."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import mthp
from fakes import FakeSpace, page_runs
from mthp.budget import Amount, as_amount
from mthp.buffers import memory_of
from mthp.engine.collapse import carry_out
from mthp.engine.picture import ACROSS, CELL, MOST, picture
from mthp.engine.planning import plan_blocks, plan_space
from mthp.engine.select import PlanOptions
from mthp.errors import UnsupportedError, UsageError
from mthp.means import Means
from mthp.ptes import Pte
from mthp.vma import Vma

BASE = 0x7F00_0000_0000
MOVABLE = frozenset({"rd", "wr", "mr", "mw", "me", "ac"})


class Served(FakeSpace):
    """A process of a service."""

    service = "pod:shop/redis-0"


def space(pages: int = 2048) -> FakeSpace:
    vma = Vma(BASE, BASE + pages * 4096, "rw-p", "[<heap>&]")
    return Served([(vma, *page_runs((512, Pte.PRESENT | Pte.PMD_MAPPED, 9), (pages - 512, Pte.PRESENT, 0)))])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    pytest.importorskip("pyarrow")
    from mthp.snapshot import record

    path = tmp_path / "inputs" / "one.parquet"
    path.parent.mkdir()
    record(space(), path)
    return path


def test_every_verb_is_public() -> None:
    verbs = (
        "inspect",
        "plan",
        "collapse",
        "trim",
        "record",
        "compare",
        "snapshot",
        "sweep",
        "verify",
        "explain",
        "find",
    )
    for verb in verbs:
        assert verb in mthp.__all__
        assert callable(getattr(mthp, verb))


def test_verbs_on_a_snapshot(file: Path, tmp_path: Path) -> None:
    assert mthp.verify(file, "2M>=25%").passed
    assert not mthp.verify(file, "2M>=26%").passed
    assert mthp.explain(file, BASE).memory
    assert mthp.compare(file, ["mainline"]).rows
    grid = tmp_path / "grid.toml"
    grid.write_text('policies = ["mainline"]')
    pytest.importorskip("joblib")
    report = mthp.sweep(file.parent, grid, tmp_path / "table", jobs=1)
    table = report.to_arrow()
    assert table.num_rows == report.rows > 0
    assert set(table["service"].to_pylist()) == {"pod:shop/redis-0"}


def test_a_snapshot_and_a_recording_of_this_process(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    assert mthp.snapshot("self", tmp_path / "one").pages  # type: ignore[operator]
    assert mthp.record("self", tmp_path / "many", duration=0.01).steps == 1
    assert mthp.inspect(tmp_path / "one").label == mthp.inspect(tmp_path / "many").label


def test_results_are_tables_of_arrow(file: Path) -> None:
    census = mthp.inspect(file).to_arrow()
    assert census.num_rows == 1
    assert census["resident_bytes"].to_pylist() == [2048 * 4096]
    assert census["pages_by_order_9"].to_pylist() == [512]
    plan = mthp.plan(file)
    assert plan.to_arrow()["order"].to_pylist() == plan.folios.order.tolist()
    assert plan.ranges.to_arrow().num_rows == 4
    assert mthp.verify(file, "2M>=1%").to_arrow()["verdict"].to_pylist() == ["passed"]
    assert mthp.compare(file, ["rfc", "mainline"]).to_arrow().num_rows


def test_a_collapse_is_a_table_of_its_orders() -> None:
    pytest.importorskip("pyarrow")
    target = space()
    report = carry_out(target, plan_space(target, PlanOptions(orders="64K,2M")), Means(max_bloat=None))
    table = report.to_arrow()
    assert dict(zip(table["order"].to_pylist(), table["planned"].to_pylist(), strict=True)) == (
        report.plan.folios_by_order
    )
    assert table["made"].to_pylist() == [report.tally(order).made for order in report.plan.folios_by_order]
    assert "reasons" not in table.column_names


def test_orders_that_only_the_mover_makes_are_rows_of_what_was_left() -> None:
    pytest.importorskip("pyarrow")
    target = space()
    report = carry_out(target, plan_space(target, PlanOptions(orders="64K")), Means(max_bloat=None))
    assert report.needs_move == {4: 96}
    assert report.to_arrow().select(["order", "planned", "made", "not_tried"]).to_pylist() == [
        {"order": 4, "planned": 96, "made": 0, "not_tried": 96}
    ]


def test_results_are_tables_of_pandas(file: Path) -> None:
    pytest.importorskip("pandas")
    assert mthp.plan(file).to_pandas()["order"].tolist() == mthp.plan(file).folios.order.tolist()


def test_a_library_that_is_missing_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(UnsupportedError) as caught:
        mthp.plan(file).to_pandas()
    assert "pip install pandas" in caught.value.help


class Interface:
    """Memory by ``__array_interface__`` alone."""

    def __init__(self, array: Any) -> None:
        self.__array_interface__ = array.__array_interface__


class Tensor:
    """Memory by DLPack alone."""

    def __init__(self, array: Any) -> None:
        self._array = array

    def __dlpack__(self, **options: Any) -> Any:
        return self._array.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


@pytest.mark.parametrize("shown", [lambda array: array, memoryview, Interface, Tensor])
def test_memory_by_each_protocol(shown: Any) -> None:
    array = np.arange(1024)
    assert memory_of(shown(array)) == (array.ctypes.data, array.nbytes)


def test_memory_of_arrow_is_its_data() -> None:
    arrow = pytest.importorskip("pyarrow")

    class Foreign:
        def __arrow_c_array__(self, schema: Any = None) -> Any:
            return array.__arrow_c_array__(schema)

    array = arrow.array([None, *range(1000)], arrow.int64())
    expected = (array.buffers()[1].address, array.buffers()[1].size)
    assert memory_of(array) == expected
    assert memory_of(Foreign()) == expected
    assert memory_of(array.buffers()[1]) == expected


def test_foreign_arrow_without_pyarrow_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign:
        def __arrow_c_array__(self, schema: Any = None) -> Any:
            raise AssertionError("read without pyarrow")

    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UnsupportedError) as caught:
        memory_of(Foreign())
    assert "pip install" in caught.value.help


def refusing(error: Exception) -> Any:
    class Refusing:
        def __dlpack__(self, **options: Any) -> Any:
            raise error

        def __dlpack_device__(self) -> Any:
            return 2, 0

    return Refusing()


def closed() -> mmap.mmap:
    memory = mmap.mmap(-1, 4096)
    memory.close()
    return memory


def test_memory_of_a_mapping() -> None:
    with mmap.mmap(-1, 8192) as memory:
        view = ctypes.c_char.from_buffer(memory)
        assert memory_of(memory) == (ctypes.addressof(view), 8192)
        del view


@pytest.mark.parametrize(
    "wrong",
    [
        7,
        "text",
        None,
        np.arange(100)[::2],
        Interface(np.arange(100)[::3]),
        closed(),
        refusing(BufferError("on a GPU")),
        refusing(RuntimeError("requires grad")),
    ],
)
def test_what_is_no_memory(wrong: Any) -> None:
    with pytest.raises(UsageError):
        memory_of(wrong)


@pytest.mark.parametrize(("pages", "most"), [(512, MOST), (2048, MOST), (2048, 2)])
def test_a_plan_is_a_picture(pages: int, most: int) -> None:
    plan = plan_space(space(pages), PlanOptions())
    svg = plan._repr_svg_() if most == MOST else picture(plan, most)
    drawn = ElementTree.fromstring(svg)
    cells = [each for each in drawn if each.tag.endswith("rect")]
    assert 0 < len(cells) <= most
    assert plan.label in "".join(drawn.itertext())
    assert "2M already" in svg
    assert pages == 512 or "becomes 2M" in svg


@pytest.mark.parametrize("small", [False, True])
def test_a_plan_of_parts_of_pmd_ranges_is_a_picture_of_the_ranges(small: bool) -> None:
    # Two mappings share a PMD range, and the second one has part of the next.
    pages = [(0, 128), (128, 768)]
    target = FakeSpace(
        [
            (Vma(BASE + first * 4096, BASE + last * 4096, "rw-p", flags=MOVABLE), *page_runs((last - first, 1, 0)))
            for first, last in pages
        ]
    )
    if small:
        plan = plan_space(target, PlanOptions(orders="64K", small=True))
    else:
        plan = plan_blocks(target, BASE, BASE + 768 * 4096, 4)
    assert plan.folios_by_order == {4: 48}
    drawn = ElementTree.fromstring(plan._repr_svg_())
    colour = next(each for each in drawn.iter() if each.tag.endswith("rect")).get("fill")
    cells = [each for each in drawn if each.tag.endswith("rect")]
    assert [cell.get("fill") for cell in cells] == [colour, colour]


def test_a_picture_of_every_size_is_no_wider_than_its_cells() -> None:
    # A mapping for each order, so that the legend has every size.
    starts = {order: BASE + (order << 30) for order in range(2, 10)}
    mappings = [
        (Vma(start, start + (4096 << order), "rw-p", flags=MOVABLE), *page_runs((1 << order, 1, 0)))
        for order, start in starts.items()
    ]
    plan = plan_space(FakeSpace(mappings), PlanOptions(small=True, orders="all"))
    drawn = ElementTree.fromstring(plan._repr_svg_())
    width, height = map(int, drawn.attrib["viewBox"].split()[2:])
    names = [each for each in drawn.iter("{http://www.w3.org/2000/svg}text") if (each.text or "").startswith("becomes")]
    assert (len(names), width) == (8, ACROSS * CELL)
    # Twelve pixels of text are less than seven a letter.
    assert all(int(each.get("x", "0")) + 7 * len(each.text or "") <= width for each in names)
    assert all(int(each.attrib["y"]) <= height for each in names)


def test_amounts_are_written_as_on_the_command_line() -> None:
    assert as_amount("10%") == Amount(share=0.1)
    assert as_amount("64M") == Amount(size=64 << 20)
    for wrong in ("x", "5", -1, [1]):
        with pytest.raises(UsageError):
            Means(max_bloat=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("expectations", [(), (["2M>=0%"],), (5,), ("2M",)])
def test_what_is_no_expectation(file: Path, expectations: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError, match="expectation"):
        mthp.verify(str(file), *expectations)


def test_a_comparison_takes_one_policy_too_and_no_other_scans(file: Path) -> None:
    assert mthp.compare(str(file), "mainline").names == ["mainline"]
    for wrong in (0, -1, "all", 1.5):
        with pytest.raises(UsageError, match="not a number of scans"):
            mthp.compare(str(file), "mainline", scans=wrong)  # type: ignore[arg-type]
