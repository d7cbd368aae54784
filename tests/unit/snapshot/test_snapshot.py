"""Recording an address space and loading it again."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest

from fakes import FakeSpace, page_runs
from mthp.errors import TargetVanishedError, UnsupportedError, UsageError
from mthp.geometry import GEOMETRIES, Geometry
from mthp.ptes import ORDER_NONE, ORDER_UNKNOWN, Pte, PteColumns, Segment
from mthp.snapshot import SnapshotInfo, info, load, record
from mthp.snapshot.formats import run_reader
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma, VmaKind

pytest.importorskip("pyarrow")
import pyarrow as pa
import pyarrow.parquet as pq

PAGE = 4096
PMD = 512 * PAGE
HEAP = 0x7F00_0000_0000
VSYSCALL = 0xFFFF_FFFF_FF60_0000

PRESENT = Pte.PRESENT
HUGE = Pte.PRESENT | Pte.PMD_MAPPED


def process() -> FakeSpace:
    """Return a small process with something of everything."""
    heap = Vma(
        HEAP + 3 * PAGE, HEAP + 3 * PMD, "rw-p", "[heap]", flags=frozenset({"rd", "wr", "hg"}), has_anon_vma=True
    )
    # A name that is not UTF-8, as os.fsdecode() returns it.
    library = Vma(HEAP + 3 * PMD, HEAP + 3 * PMD + 4 * PAGE, "r-xp", "/lib/\udcff.so", VmaKind.FILE, has_anon_vma=False)
    device = Vma(HEAP + 4 * PMD, HEAP + 4 * PMD + 2 * PAGE, "rw-s", "/dev/gpu", VmaKind.SPECIAL)
    high = Vma(VSYSCALL, VSYSCALL + PAGE, "--xp", "[vsyscall]", node_pages=((0, 3), (1, 4)))
    return FakeSpace(
        [
            (
                heap,
                *page_runs(
                    (509, PRESENT, 0),
                    (512, HUGE, 9),
                    (100, 0, ORDER_NONE),
                    (16, PRESENT | Pte.SHARED, 4),
                    (4, Pte.SWAP, ORDER_NONE),
                    (392, PRESENT, ORDER_UNKNOWN),
                ),
            ),
            (library, *page_runs((4, PRESENT | Pte.FILE, 2))),
            (device, *page_runs((2, PRESENT, 0))),
            (high, *page_runs((1, PRESENT, 0))),
        ],
        label="1234 (redis-server)",
        kernel="6.18.44",
        switches=Switches("always", {2: "never", 9: "inherit"}),
        tunables=Tunables(7, 8, 9, 4096, defrag=False),
        thp_disabled=True,
        missing=("folio orders: run as root",),
    )


def rows(path: Path) -> list[tuple[int, int, int, int, int]]:
    """The rows as any Parquet reader sees them."""
    table = pq.read_table(path)
    return list(zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True))


@pytest.fixture(params=["redis.parquet", "redis.mthp"])
def file(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    name: str = request.param
    return tmp_path / name


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    return tmp_path / "redis.parquet"


def test_what_was_recorded_comes_back(file: Path) -> None:
    space = process()
    record(space, file)
    with load(file) as snapshot:
        assert snapshot.vmas() == space.vmas()
        assert snapshot.geometry == space.geometry
        assert snapshot.label == "1234 (redis-server)"
        assert snapshot.kernel == "6.18.44"
        assert snapshot.switches == space.switches
        assert snapshot.tunables == space.tunables
        assert snapshot.thp_disabled is True
        assert snapshot.missing == space.missing
        segments = [(vma.start, vma.end) for vma in space.vmas() if vma.kind is not VmaKind.SPECIAL]
        expected, got = space.read(segments), snapshot.read(segments)
    assert got.segments == tuple(segments)
    assert got.pfn is None
    assert got.state.dtype == np.uint16
    assert got.folio_order.dtype == np.int8
    np.testing.assert_array_equal(got.state, expected.state)
    np.testing.assert_array_equal(got.folio_order, expected.folio_order)


def test_a_row_is_a_run_of_equal_pages_in_one_mapping(parquet: Path) -> None:
    record(process(), parquet)
    assert rows(parquet) == [
        (0, HEAP + 3 * PAGE, 509, PRESENT, 0),
        (0, HEAP + PMD, 512, HUGE, 9),
        (0, HEAP + 2 * PMD + 100 * PAGE, 16, PRESENT | Pte.SHARED, 4),
        (0, HEAP + 2 * PMD + 116 * PAGE, 4, Pte.SWAP, ORDER_NONE),
        (0, HEAP + 2 * PMD + 120 * PAGE, 392, PRESENT, ORDER_UNKNOWN),
        (1, HEAP + 3 * PMD, 4, PRESENT | Pte.FILE, 2),
        (3, VSYSCALL, 1, PRESENT, 0),
    ]


def test_neighbouring_mappings_with_equal_pages_are_two_rows(parquet: Path) -> None:
    mappings = [Vma(HEAP, HEAP + 2 * PAGE, "rw-p"), Vma(HEAP + 2 * PAGE, HEAP + 4 * PAGE, "r--p")]
    record(FakeSpace([(vma, *page_runs((2, PRESENT, 0))) for vma in mappings]), parquet)
    assert rows(parquet) == [(0, HEAP, 2, PRESENT, 0), (1, HEAP + 2 * PAGE, 2, PRESENT, 0)]


@pytest.mark.parametrize("portion_size", [1, PMD, 2 * PMD, 1 << 30])
def test_rows_do_not_depend_on_the_portion_size(tmp_path: Path, portion_size: int) -> None:
    record(process(), tmp_path / "default")
    record(process(), tmp_path / "other", portion_size=portion_size)
    assert rows(tmp_path / "other") == rows(tmp_path / "default")


def test_info_of_recording_and_of_file_agree(file: Path) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    made = record(process(), file)
    assert made == SnapshotInfo(
        path=str(file),
        label="1234 (redis-server)",
        kernel="6.18.44",
        recorded_at=made.recorded_at,
        vmas=4,
        pages=509 + 512 + 16 + 4 + 392 + 4 + 1,
        runs=7,
        bytes=file.stat().st_size,
        version=1,
    )
    assert before <= datetime.fromisoformat(made.recorded_at) <= datetime.now(UTC)
    assert info(file) == made
    with load(file) as snapshot:
        assert snapshot.info == made


def test_description_is_one_json_object_that_any_reader_shows(parquet: Path) -> None:
    record(process(), parquet)
    description = json.loads(pq.read_metadata(parquet).metadata[b"mthp.snapshot"])
    assert description["version"] == 1
    assert description["schema"] == "mthp.snapshot-file/1"
    assert description["geometry"] == {"name": "x86-64", "page_size": 4096, "pmd_order": 9}
    assert description["state_bits"]["LAZYFREE"] == Pte.LAZYFREE.value
    assert [vma["name"] for vma in description["vmas"]] == ["[heap]", "/lib/\udcff.so", "/dev/gpu", "[vsyscall]"]


def test_columns_have_the_documented_types_and_zstd(parquet: Path) -> None:
    record(process(), parquet)
    assert {field.name: str(field.type) for field in pq.read_schema(parquet)} == {
        "vma": "int32",
        "start": "uint64",
        "pages": "uint64",
        "state": "uint16",
        "folio_order": "int8",
    }
    assert pq.read_metadata(parquet).row_group(0).column(0).compression == "ZSTD"


def test_entries_of_special_mappings_are_not_read(file: Path) -> None:
    class Watched(FakeSpace):
        def read(self, segments: Sequence[Segment]) -> PteColumns:
            assert not any(HEAP <= start < HEAP + PMD for start, _ in segments)
            return super().read(segments)

    special = Vma(HEAP, HEAP + 4 * PAGE, "rw-s", kind=VmaKind.SPECIAL)
    plain = Vma(HEAP + PMD, HEAP + PMD + PAGE, "rw-p")
    space = Watched([(special, *page_runs((4, PRESENT, 0))), (plain, *page_runs((1, PRESENT, 0)))])
    assert record(space, file).pages == 1


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=str)
def test_no_pmd_range_is_cut_between_two_reads(file: Path, geometry: Geometry) -> None:
    """A backend that derives a folio's order from its pages would be misled by a half of it."""
    reads: list[tuple[int, int]] = []

    class Watched(FakeSpace):
        def read(self, segments: Sequence[Segment]) -> PteColumns:
            reads.extend(segments)
            return super().read(segments)

    start = geometry.pmd_size * 10 + 3 * geometry.page_size
    pages = 3 * geometry.ptes_per_pmd
    vma = Vma(start, start + pages * geometry.page_size, "rw-p")
    record(Watched([(vma, *page_runs((pages, PRESENT, 0)))], geometry=geometry), file, portion_size=1)
    assert len(reads) == 4
    inner = {edge for segment in reads for edge in segment} - {vma.start, vma.end}
    assert all(edge % geometry.pmd_size == 0 for edge in inner)


def test_progress_rises_to_the_size_of_all_mappings(file: Path) -> None:
    space, seen = process(), list[tuple[int, int]]()
    record(space, file, portion_size=PMD, progress=lambda done, total: seen.append((done, total)))
    total = sum(vma.size for vma in space.vmas())
    done = [step for step, _ in seen]
    assert {whole for _, whole in seen} == {total}
    assert len(done) > 3
    assert done == sorted(done)
    assert done[-1] == total


def test_a_process_with_nothing_mapped(file: Path) -> None:
    vma = Vma(HEAP, HEAP + PMD, "rw-p")
    record(FakeSpace([(vma, *page_runs((512, 0, ORDER_NONE)))]), file)
    with load(file) as snapshot:
        assert snapshot.info.runs == 0
        assert snapshot.populated([(HEAP, HEAP + PMD)], PMD) == []
        assert snapshot.read([]).state.shape == (0,)
        columns = snapshot.read([(HEAP, HEAP + PMD)])
    assert not columns.state.any()
    assert (columns.folio_order == ORDER_NONE).all()


def test_many_row_groups(file: Path) -> None:
    ranges = 512
    state = np.where(np.arange(ranges * 512) % 3, PRESENT, 0).astype(np.uint16)
    state[6 * 512 : 9 * 512] = 0
    folio_order = np.where(state, np.arange(ranges * 512) % 2, ORDER_NONE).astype(np.int8)
    vma = Vma(HEAP, HEAP + ranges * PMD, "rw-p")
    space = FakeSpace([(vma, state, folio_order)])
    record(space, file, portion_size=16 * PMD)
    with contextlib.closing(run_reader(file)) as reader:
        assert reader.row_groups > 2
    segments = [(HEAP + 5 * PMD, HEAP + 10 * PMD), (HEAP, HEAP + PAGE), (HEAP, vma.end)]
    with load(file) as snapshot:
        columns = snapshot.read(segments)
        assert snapshot.populated(segments, PMD) == space.populated(segments, PMD)
    np.testing.assert_array_equal(columns.state, space.read(segments).state)
    np.testing.assert_array_equal(columns.folio_order, space.read(segments).folio_order)


def test_a_snapshot_cannot_be_collapsed(file: Path) -> None:
    record(process(), file)
    with load(file) as snapshot, pytest.raises(UnsupportedError) as caught:
        snapshot.collapse(HEAP, 9)
    assert "plan" in caught.value.help


def test_the_file_is_private(file: Path) -> None:
    record(process(), file)
    assert file.stat().st_mode & 0o077 == 0


class TestOutput:
    """Obstacles to writing a file, and that no partial file is left."""

    @pytest.fixture(autouse=True)
    def _nothing_left_behind(self, tmp_path: Path) -> Iterator[None]:
        yield
        assert not list(tmp_path.glob(".mthp-*"))

    def test_an_existing_file_stays(self, file: Path) -> None:
        file.write_text("precious")
        with pytest.raises(UsageError, match="exists") as caught:
            record(process(), file)
        assert "--force" in caught.value.help
        assert file.read_text() == "precious"

    def test_overwrite_replaces_it(self, file: Path) -> None:
        file.write_text("precious")
        made = record(process(), file, overwrite=True)
        assert info(file) == made

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_ctrl_c(self, file: Path, overwrite: bool) -> None:
        if overwrite:
            file.write_text("precious")
        with pytest.raises(KeyboardInterrupt):
            record(process(), file, portion_size=PMD, progress=interrupt_at(2), overwrite=overwrite)
        assert file.read_text() == "precious" if overwrite else not file.exists()

    def test_a_process_that_exits_meanwhile(self, file: Path) -> None:
        space = process()

        def kill(done: int, total: int) -> None:
            space.vanished = True

        with pytest.raises(TargetVanishedError):
            record(space, file, portion_size=PMD, progress=kill)
        assert not file.exists()

    def test_block_size(self, file: Path) -> None:
        with pytest.raises(UsageError, match="portion size 0"):
            record(process(), file, portion_size=0)


def test_without_pyarrow(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(process(), parquet)
    for module in [name for name in sys.modules if name.partition(".")[0] == "pyarrow"]:
        monkeypatch.setitem(sys.modules, module, None)
    for use in (lambda: record(process(), parquet, overwrite=True), lambda: load(parquet), lambda: info(parquet)):
        with pytest.raises(UnsupportedError) as caught:
            use()
        assert "mthp[snapshot]" in caught.value.help
        assert ".mthp" in caught.value.help


def test_huge_uniform_process_is_a_small_file(file: Path) -> None:
    """64 GiB: half in 2 MiB folios, half in base pages."""
    pages = 1 << 24
    vma = Vma(HEAP, HEAP + pages * PAGE, "rw-p")

    class Cheap(FakeSpace):
        def populated(self, segments: Sequence[Segment], granule: int) -> list[Segment]:
            return list(segments)

    made = record(Cheap([(vma, *page_runs((pages // 2, HUGE, 9), (pages // 2, PRESENT, 0)))]), file)
    assert (made.runs, made.pages) == (2, pages)
    assert made.bytes < 10_000


def interrupt_at(call: int) -> Callable[[int, int], None]:
    calls = 0

    def progress(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt

    return progress


def test_state_bits_cover_every_bit_of_pte(parquet: Path) -> None:
    """A new bit must be named in files, or it would be lost."""
    record(process(), parquet)
    bits = json.loads(pq.read_metadata(parquet).metadata[b"mthp.snapshot"])["state_bits"]
    assert bits == {bit.name: bit.value for bit in Pte}
    assert pa.types.is_uint16(pq.read_schema(parquet).field("state").type)
    assert max(bits.values()) < 1 << 16
