"""Files that are not whole snapshots of this version: each gets a UsageError that names it and the error."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import FakeSpace, page_runs
from mthp.errors import UsageError
from mthp.ptes import ORDER_NONE, Pte
from mthp.snapshot import info, load, record
from mthp.vma import Vma

pytest.importorskip("pyarrow")
import pyarrow as pa
import pyarrow.parquet as pq

PAGE = 4096
HEAP = 0x5555_0000_0000
LOW = Vma(HEAP, HEAP + 64 * PAGE, "rw-p", "[heap]")
HIGH = Vma(HEAP + 128 * PAGE, HEAP + 160 * PAGE, "rw-p")

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole.parquet"
    space = FakeSpace(
        [
            (LOW, *page_runs((8, Pte.PRESENT, 0), (24, Pte.PRESENT | Pte.UNREFERENCED, 2), (32, 0, ORDER_NONE))),
            (HIGH, *page_runs((32, Pte.PRESENT | Pte.LAZYFREE, 0))),
        ]
    )
    record(space, path)
    return path


def rewritten(
    whole: Path,
    edit: Edit | None = None,
    columns: Mapping[str, Any] | None = None,
    text: str | None = None,
) -> Path:
    """Return a copy of the file with its description edited or replaced by `text`, and columns replaced."""
    path = whole.with_name("rewritten.parquet")
    description = json.loads(pq.read_metadata(whole).metadata[b"mthp.snapshot"])
    if edit:
        edit(description)
    table = pq.read_table(whole)
    for name, values in (columns or {}).items():
        index = table.schema.get_field_index(name)
        values = values if isinstance(values, pa.Array) else pa.array(values, table.schema.field(name).type)
        table = table.set_column(index, name, values)
    metadata = {"mthp.snapshot": json.dumps(description) if text is None else text}
    pq.write_table(table.replace_schema_metadata(metadata), path)
    return path


def refusal(path: Path, match: str) -> UsageError:
    """Return the error of loading `path`."""
    with pytest.raises(UsageError, match=match) as caught:
        load(path)
    assert str(path) in str(caught.value)
    return caught.value


def test_rewriting_alone_does_no_harm(whole: Path) -> None:
    """Otherwise the tests below would prove nothing."""
    with load(rewritten(whole)) as copy, load(whole) as original:
        segments = [(HEAP, HIGH.end)]
        np.testing.assert_array_equal(copy.read(segments).state, original.read(segments).state)


def test_cut_at_any_length(whole: Path) -> None:
    contents = whole.read_bytes()
    path = whole.with_name("cut.parquet")
    for length in [*range(0, len(contents), 7), *range(len(contents) - 16, len(contents))]:
        path.write_bytes(contents[:length])
        refusal(path, "not a snapshot|cut short")
        with pytest.raises(UsageError):
            info(path)


def test_a_changed_byte_is_found_or_harmless(whole: Path) -> None:
    """Checksums guard the runs, and the rest is checked. No other exception may escape."""
    contents = whole.read_bytes()
    path = whole.with_name("changed.parquet")
    footer = len(contents) - int.from_bytes(contents[-8:-4], "little") - 8
    segments = [(HEAP, HIGH.end)]
    with load(whole) as snapshot:
        expected = snapshot.read(segments)
    refused = 0
    for at in range(0, len(contents), 3):
        path.write_bytes(contents[:at] + bytes([contents[at] ^ 0x55]) + contents[at + 1 :])
        try:
            with load(path) as snapshot:
                columns = snapshot.read(segments)
        except UsageError:
            refused += 1
            continue
        if at < footer:
            np.testing.assert_array_equal(columns.state, expected.state)
            np.testing.assert_array_equal(columns.folio_order, expected.folio_order)
    assert refused > len(contents) // 6


def test_no_such_file(tmp_path: Path) -> None:
    refusal(tmp_path / "none.parquet", "No such file")


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo], ids=["directory", "fifo"])
def test_not_a_regular_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "x")
    refusal(tmp_path / "x", "not a regular file")


@pytest.mark.parametrize("contents", [b"", b"P", b"pid,address\n1,2\n", b"\x7fELF" + bytes(4000)])
def test_not_parquet(tmp_path: Path, contents: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(contents)
    assert "mthp snapshot" in refusal(path, "not a snapshot").help


def test_parquet_of_something_else(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"start": [1, 2]}), path)
    refusal(path, "not a snapshot: a Parquet file of something else")


def test_a_newer_version(whole: Path) -> None:
    path = rewritten(whole, lambda d: (d.update(version=2, schema="mthp.snapshot-file/2"), d.pop("vmas")))
    assert "upgrade" in refusal(path, "made by a newer mthp").help
    with pytest.raises(UsageError, match="newer mthp"):
        info(path)


def test_a_newer_version_with_other_columns(whole: Path) -> None:
    refusal(rewritten(whole, lambda d: d.update(version=2), {"start": pa.array(["a"] * 3)}), "made by a newer mthp")


def test_keys_columns_and_bits_that_nobody_knows_are_ignored(whole: Path) -> None:
    def edit(description: dict[str, Any]) -> None:
        description["colour"] = "blue"
        description["tunables"]["max_ptes_blue"] = 3
        description["vmas"][0]["colour"] = "blue"
        # PRESENT moves to a bit of another name here, and the last run has an unknown bit alone.
        description["state_bits"] = {"PRESENT": 1 << 3, "UNREFERENCED": 1 << 0, "BLUE": 1 << 15}

    path = rewritten(whole, edit, {"state": [1 << 3, 1 << 3 | 1 | 1 << 15, 1 << 15]})
    with load(path) as snapshot:
        columns = snapshot.read([(LOW.start, LOW.start + 32 * PAGE), (HIGH.start, HIGH.end)])
    assert set(columns.state[:8]) == {Pte.PRESENT}
    assert set(columns.state[8:32]) == {Pte.PRESENT | Pte.UNREFERENCED}
    assert not columns.state[32:].any()
    assert (columns.folio_order[32:] == ORDER_NONE).all()


@pytest.mark.parametrize("text", ["", "null", "[]", "{", "[" * 100_000, "{}", '{"version": true}', '{"version": "1"}'])
def test_a_description_that_is_none(whole: Path, text: str) -> None:
    refusal(rewritten(whole, text=text), "damaged")


KINDS = {
    "version": int, "schema": str, "recorded_at": str, "label": str, "service": str, "kernel": str, "geometry": dict,
    "switches": dict, "tunables": dict, "thp_disabled": bool, "missing": list, "pages": int, "state_bits": dict,
    "vmas": list,
}  # fmt: skip


@pytest.mark.parametrize("key", KINDS)
def test_a_value_of_the_wrong_kind(whole: Path, key: str) -> None:
    assert json.loads(pq.read_metadata(whole).metadata[b"mthp.snapshot"]).keys() == KINDS.keys()
    values: list[object] = [None, 0, True, "2026-01-01T00:00:00Z", 1.5, [], {}]
    for value in values:
        if type(value) is not KINDS[key]:
            refusal(rewritten(whole, functools.partial(dict.update, **{key: value})), "damaged")
    without = rewritten(whole, lambda d: d.pop(key))
    if key == "service":
        # Files of earlier versions do not have it.
        with load(without) as snapshot:
            assert snapshot.service == ""
    else:
        refusal(without, "damaged")


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d["geometry"].update(page_size=3),
        lambda d: d["geometry"].update(page_size=1 << 40),
        lambda d: d["geometry"].update(pmd_order=60),
        lambda d: d["geometry"].update(pmd_order=8),
        lambda d: d["geometry"].update(name="arm64-64k"),
        lambda d: d["switches"].update(enabled="sometimes"),
        lambda d: d["switches"].update(sizes={"64K": "always"}),
        lambda d: d["tunables"].pop("max_ptes_none"),
        lambda d: d["tunables"].update(defrag=1),
        lambda d: d["vmas"][0].update(kind="blue"),
        lambda d: d["vmas"][0].update(start=True),
        lambda d: d["vmas"][0].update(flags=[1]),
        lambda d: d["vmas"][0].update(has_anon_vma="yes"),
        lambda d: d["vmas"][0].update(node_pages=[[1]]),
        lambda d: d["vmas"][0].update(start=HEAP + 1),
        lambda d: d["vmas"][0].update(end=HEAP),
        lambda d: d["vmas"][1].update(end=1 << 65),
        lambda d: d["vmas"].reverse(),
        lambda d: d["vmas"].pop(),
        lambda d: d.update(missing=[3]),
        lambda d: d.update(pages=63),
        lambda d: d["state_bits"].update(PRESENT=3),
        lambda d: d["state_bits"].update(PRESENT=2),
        lambda d: d["state_bits"].update(PRESENT=1 << 16),
    ],
)
def test_a_description_that_makes_no_sense(whole: Path, edit: Edit) -> None:
    refusal(rewritten(whole, edit), "damaged")


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        ({"vma": [0, 0, 2]}, "not listed"),
        ({"vma": [-1, 0, 1]}, "not listed"),
        ({"vma": [0, 1, 1]}, "leaves its mapping"),
        ({"start": [HEAP - PAGE, HEAP + 8 * PAGE, HIGH.start]}, "leaves its mapping"),
        ({"start": [HEAP, HEAP + 8 * PAGE, HIGH.start + PAGE]}, "leaves its mapping"),
        ({"start": [HEAP, HEAP + 7 * PAGE, HIGH.start]}, "overlap"),
        ({"start": [HEAP + 40 * PAGE, HEAP + 8 * PAGE, HIGH.start]}, "ascend"),
        ({"start": [HEAP + 1, HEAP + 8 * PAGE, HIGH.start]}, "whole pages"),
        ({"pages": [0, 32, 32]}, "whole pages"),
        ({"pages": [8, 24, (1 << 64) - 1]}, "whole pages"),
        ({"pages": [8, 24, 31]}, "holds 63 pages, not the 64"),
        ({"folio_order": [0, -3, 0]}, "folio order"),
        ({"state": [1, None, 1]}, "missing"),
        ({"state": pa.array([1.0, 2.0, 3.0])}, "no column 'state' of type uint16"),
    ],
)
def test_runs_that_contradict(whole: Path, columns: Mapping[str, Any], match: str) -> None:
    refusal(rewritten(whole, columns=columns), match)


def test_a_column_is_missing(whole: Path) -> None:
    path = whole.with_name("x.parquet")
    table = pq.read_table(whole)
    metadata = {"mthp.snapshot": pq.read_metadata(whole).metadata[b"mthp.snapshot"]}
    pq.write_table(table.drop_columns(["vma"]).replace_schema_metadata(metadata), path)
    refusal(path, "no column 'vma'")


def test_row_groups_that_overlap(whole: Path) -> None:
    """Each row group alone is in order; together they are not."""
    path = whole.with_name("x.parquet")
    table = pq.read_table(whole)
    metadata = {"mthp.snapshot": pq.read_metadata(whole).metadata[b"mthp.snapshot"]}
    table = pa.concat_tables([table.slice(2, 1), table.slice(0, 2)]).replace_schema_metadata(metadata)
    pq.write_table(table, path, row_group_size=1)
    refusal(path, "ascend")


def test_damage_after_loading_is_a_usage_error_too(tmp_path: Path) -> None:
    """The file is larger than the part that a buffer of the open file may still have."""
    path = tmp_path / "large.parquet"
    state = np.random.default_rng(0).integers(1, 1 << 12, 1 << 16).astype(np.uint16)
    vma = Vma(HEAP, HEAP + len(state) * PAGE, "rw-p")
    record(FakeSpace([(vma, state, np.zeros(len(state), np.int8))]), path)
    with load(path) as snapshot:
        os.truncate(path, 4)
        with pytest.raises(UsageError, match="cut short"):
            snapshot.read([(HEAP, HEAP + PAGE)])
