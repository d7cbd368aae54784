"""Altered snapshots, recordings and traces: a UsageError or an address space, never another outcome."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes import FakeSpace, page_runs
from hostile import JUNK, altered, bomb, damaged, refuses
from mthp.addrspace import AddressSpace
from mthp.bounded import FACTOR_VARIABLE
from mthp.engine.census import take_census
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.errors import UsageError
from mthp.ptes import Pte
from mthp.snapshot import Pace, Recording, load, record, record_series
from mthp.snapshot.fromtrace import record_trace
from mthp.snapshot.parquetpages import inflated_bytes
from mthp.snapshot.recording import packed_pages
from mthp.vma import Vma

pytest.importorskip("pyarrow")
import pyarrow as pa
import pyarrow.parquet as pq

from strategies import examples

PAGE = 4096
HEAP = 0x5555_0000_0000
EXAMPLES = settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])


def space() -> FakeSpace:
    low = Vma(HEAP, HEAP + 64 * PAGE, "rw-p", "[heap]", flags=frozenset({"rd", "hg"}), node_pages=((0, 32),))
    high = Vma(HEAP + 512 * PAGE, HEAP + 1024 * PAGE, "rw-p")
    return FakeSpace(
        [
            (low, *page_runs((8, Pte.PRESENT, 0), (24, Pte.PRESENT | Pte.UNREFERENCED, 2), (32, 0, -1))),
            (high, *page_runs((512, Pte.PRESENT, 0))),
        ]
    )


def used(opened: AddressSpace) -> None:
    """Do with an address space what commands do."""
    take_census(opened)
    plan_space(opened, PlanOptions())


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("snapshot") / "whole.parquet"
    record(space(), path)
    return path


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recording") / "whole.rec"
    record_series(space(), path, Pace(every=0.001, duration=0.003))
    return path


def opened_or_refused(path: Path) -> None:
    try:
        with load(path) as snapshot:
            used(snapshot)
    except UsageError as error:
        refuses(error)


def replayed_or_refused(path: Path) -> None:
    try:
        recording = Recording(path)
        for step in recording.walk():
            used(step)
        list(recording.accesses())
        recording.space()
        recording.step_at("1")
    except UsageError as error:
        refuses(error)


@EXAMPLES
@given(st.data())
def test_a_description_that_was_altered(snapshot: Path, tmp_path: Path, data: st.DataObject) -> None:
    table = pq.read_table(snapshot)
    description = json.loads(table.schema.metadata[b"mthp.snapshot"])
    text = json.dumps(data.draw(altered(description)))
    pq.write_table(table.replace_schema_metadata({"mthp.snapshot": text}), tmp_path / "altered")
    opened_or_refused(tmp_path / "altered")


@EXAMPLES
@given(st.data())
def test_columns_that_were_altered(snapshot: Path, tmp_path: Path, data: st.DataObject) -> None:
    table = pq.read_table(snapshot)
    for index, field in list(enumerate(table.schema)):
        if data.draw(st.booleans()):
            info = np.iinfo(field.type.to_pandas_dtype())
            low, high = int(info.min), int(info.max)
            values = st.integers(low, high) | st.sampled_from([0, 1, min(PAGE, high), min(HEAP, high), high])
            kept = st.sampled_from(table.column(index).to_pylist())
            column = data.draw(st.lists(values | kept, min_size=len(table), max_size=len(table)))
            table = table.set_column(index, field, pa.array(column, field.type))
    pq.write_table(table, tmp_path / "altered")
    opened_or_refused(tmp_path / "altered")


@EXAMPLES
@given(st.data())
def test_bytes_of_a_snapshot(snapshot: Path, tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "damaged").write_bytes(data.draw(damaged(snapshot.read_bytes())))
    opened_or_refused(tmp_path / "damaged")


@EXAMPLES
@given(st.data())
def test_bytes_of_a_recording(recording: Path, tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "damaged").write_bytes(data.draw(damaged(recording.read_bytes())))
    replayed_or_refused(tmp_path / "damaged")


def rewritten(recording: Path, path: Path, change: Any) -> None:
    """Return a copy of a recording in which `change` altered each step, with correct checksums."""
    stream = pa.ipc.open_stream(recording.read_bytes())
    with path.open("wb") as file, pa.ipc.new_stream(file, stream.schema) as writer:
        while True:
            try:
                batch, metadata = stream.read_next_batch_with_custom_metadata()
            except StopIteration:
                return
            meta = json.loads(metadata[b"mthp.recording"])
            changed = change(meta)
            if isinstance(changed, dict):
                changed |= {"crc": meta["crc"]}
            writer.write_batch(batch, custom_metadata={"mthp.recording": json.dumps(changed)})


@EXAMPLES
@given(st.data())
def test_steps_that_were_altered(recording: Path, tmp_path: Path, data: st.DataObject) -> None:
    rewritten(recording, tmp_path / "altered", lambda meta: data.draw(altered(meta)))
    replayed_or_refused(tmp_path / "altered")


@EXAMPLES
@given(key=st.sampled_from(["vmas", "vmas_gone", "counters", "changed", "accesses", "seconds", "end"]), junk=JUNK)
def test_steps_that_say_something_else(recording: Path, tmp_path: Path, key: str, junk: Any) -> None:
    for value in (junk, [junk], {"switches": junk, "tunables": junk, "geometry": junk, "x": junk}):
        rewritten(recording, tmp_path / "altered", lambda meta, value=value: meta | {key: value})
        replayed_or_refused(tmp_path / "altered")


WORDS = (
    *(" L ", " S ", " M ", "I  ", "==1== ", "04222ff8,16", "ffffffffffffffff,8", "f" * 17 + ",8", "0,0", ",", "\n"),
    *("redis 4711 [001] 12345.678901:", "1 cpu/mem/P:", "7f8a1c2d3040", "9" * 400 + ".9:", "page-faults:", " ", "\t"),
    *("monitoring_end:", "104.599 ms", "9" * 400 + " h", "9" * 400, "target_id: 0", "base_time_absolute: 2 m"),
    *("563ebaa00000-563ebaa04000(  16.000 KiB):    1", "0000-8000000000000000 (x) -1 0 2", "0000-0000(x): 1"),
    *("1000-7fffffffffffffff(x): 1", "563ebaa00000-563ebaa04000 ( 16 KiB) 7 " + "9" * 900, "\0", "\ufffd", "é"),
)


@EXAMPLES
@given(st.lists(st.sampled_from(WORDS) | st.sampled_from(["\n", "\n"])).map("".join))
def test_traces(tmp_path: Path, text: str) -> None:
    (tmp_path / "trace").write_text(text)
    try:
        record_trace(tmp_path / "trace", tmp_path / "made", overwrite=True)
    except UsageError as error:
        refuses(error)
        return
    replayed_or_refused(tmp_path / "made")


@pytest.mark.parametrize(
    "line", ["a" + " " * 999, "a " * 500, "1 " * 500, "1" * 1000, "x 1 1.1: " + "a" * 990, ": " * 500]
)
def test_lines_that_take_a_search_long(tmp_path: Path, line: str) -> None:
    (tmp_path / "trace").write_text("redis 1 1.1: 1000\n" * 100 + f"{line}\n" * 300)
    assert record_trace(tmp_path / "trace", tmp_path / "made", overwrite=True).accesses >= 100
    # An endless line is neither kept in memory nor read as many lines.
    (tmp_path / "trace").write_text("redis 1 1.1: 1000\n" + line * 5000)
    assert record_trace(tmp_path / "trace", tmp_path / "made", overwrite=True).skipped == 1


# What takes few bytes in a file, and many in memory.


def described(snapshot: Path, vmas: list[dict[str, Any]], pages: int) -> dict[str, str]:
    description = json.loads(pq.read_metadata(snapshot).metadata[b"mthp.snapshot"])
    return {"mthp.snapshot": json.dumps(description | {"vmas": vmas, "pages": pages})}


def mapping(pages: int) -> dict[str, Any]:
    return {
        "start": 0,
        "end": pages * PAGE,
        "permissions": "rw-p",
        "name": "",
        "kind": "anon",
        "offset": 0,
        "flags": [],
        "has_anon_vma": True,
        "node_pages": [],
    }


TYPES = {"vma": pa.int32(), "start": pa.uint64(), "pages": pa.uint64(), "state": pa.uint16(), "folio_order": pa.int8()}
SCHEMA = pa.schema(list(TYPES.items()))


def test_a_run_of_2_to_the_33_pages(snapshot: Path, tmp_path: Path) -> None:
    path, pages = tmp_path / "run", 1 << 33
    columns = [[0], [0], [pages], [int(Pte.PRESENT)], [0]]
    schema = SCHEMA.with_metadata(described(snapshot, [mapping(pages)], pages))
    pq.write_table(pa.table([pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)], schema=schema), path)
    assert path.stat().st_size < 4096
    assert f"{FACTOR_VARIABLE}=32" in bomb(path, "inspect", path)


def test_a_row_group_of_many_runs(snapshot: Path, tmp_path: Path) -> None:
    path, count = tmp_path / "rows", 1 << 23
    schema = SCHEMA.with_metadata(described(snapshot, [mapping(count)], count))
    columns = [np.zeros(count, np.int32), np.arange(count, dtype=np.uint64) * PAGE]
    columns += [np.ones(count, np.uint64), np.ones(count, np.uint16), np.zeros(count, np.int8)]
    table = pa.table([pa.array(column) for column in columns], schema=schema)
    pq.write_table(
        table,
        path,
        compression="zstd",
        row_group_size=count,
        column_encoding={"start": "DELTA_BINARY_PACKED"},
        use_dictionary=False,
    )
    assert "runs of pages at a time" in bomb(path, "inspect", path)


def test_a_page_that_inflates_to_more_than_its_rows(snapshot: Path) -> None:
    """The footer says little; the header of the page, which Arrow allocates by, says 2 GiB."""
    group = pq.ParquetFile(snapshot).metadata.row_group(0)
    for index in range(group.num_columns):
        chunk = group.column(index)
        with snapshot.open("rb") as file:
            assert 0 < inflated_bytes(file, chunk) <= chunk.total_uncompressed_size
    # Type 0, then the two sizes as varints in zigzag, then the end of the structure.
    header = bytes([0x15, 0, 0x15, 0xFE, 0xFF, 0xFF, 0xFF, 0x0F, 0x15, 8, 0])
    lying = SimpleNamespace(
        data_page_offset=0, has_dictionary_page=False, total_compressed_size=len(header) + 4, total_uncompressed_size=50
    )
    assert inflated_bytes(io.BytesIO(header + bytes(4)), lying) == (1 << 31) - 1
    for wrong in (header[:-1], bytes(15), b"\xff" * 15, b"\x19" + b"\xf8" * 14, b""):
        with pytest.raises(UsageError, match="contradict"):
            inflated_bytes(io.BytesIO(wrong), lying)


def test_a_recording_that_inflates(recording: Path, tmp_path: Path) -> None:
    """64 steps that are a megabyte in the file, and gibibytes in memory."""
    path, count = tmp_path / "inflates", 1 << 23
    stream = pa.ipc.open_stream(recording.read_bytes())
    columns = [
        np.zeros(count, np.uint64),
        np.zeros(count, np.uint64),
        np.zeros(count, np.uint16),
        np.zeros(count, np.int8),
    ]
    batch = pa.record_batch([pa.array(column) for column in columns], schema=stream.schema)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with path.open("wb") as file, pa.ipc.new_stream(file, stream.schema, options=options) as writer:
        for _ in range(16):
            writer.write_batch(batch, custom_metadata={"mthp.recording": "{}"})
    assert path.stat().st_size < 1 << 20
    assert "runs of pages at a time" in bomb(path, "inspect", path)


def test_a_column_that_inflates_to_more_than_its_rows(recording: Path, tmp_path: Path) -> None:
    contents = recording.read_bytes()
    magic = contents.index(
        b"\x28\xb5\x2f\xfd"
    )  # of the first zstd frame, in front of which is the size it has inflated
    path = tmp_path / "column"
    path.write_bytes(contents[: magic - 8] + (8 << 30).to_bytes(8, "little") + contents[magic:])
    bomb(path, "inspect", path)


@pytest.mark.slow
def test_accesses_that_inflate(recording: Path, tmp_path: Path) -> None:
    path = tmp_path / "accesses"
    text = packed_pages(np.zeros(1 << 26, np.int64))
    rewritten(recording, path, lambda meta: meta | {"accesses": text})
    assert "used in one step" in bomb(path, "compare", path)


def test_a_trace_that_wants_128_gib(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("target_id: 0\nmonitoring_end: 1 s\n0000-400000000000(64 TiB):  1\n")
    assert path.stat().st_size < 120
    assert f"{FACTOR_VARIABLE}=1024" in bomb(path, "record", "--from-trace", path, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_description_of_many_values(snapshot: Path, tmp_path: Path) -> None:
    path = tmp_path / "values"
    text = "[" + "[]," * (8 << 20) + "[]]"
    pq.write_table(pq.read_table(snapshot).replace_schema_metadata({"mthp.snapshot": text}), path)
    assert "values in JSON" in bomb(path, "plan", path)
