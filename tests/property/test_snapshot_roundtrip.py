"""A recording reads back as it was written, for any address space and any query."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import FakeSpace, page_runs
from mthp.geometry import GEOMETRIES, Geometry
from mthp.ptes import ORDER_NONE, ORDER_UNKNOWN, Pte, Segment
from mthp.snapshot import load, record
from mthp.tunables import SIZE_WORDS, TOP_WORDS, Switches, Tunables
from mthp.vma import Vma, VmaKind
from strategies import examples

pytest.importorskip("pyarrow")

ALL_BITS = sum(Pte)
HIGHEST_FILE_ORDER = 18
"""Of a 1 GiB page of 4 KiB pages: folios that are not anonymous exceed the PMD order."""


def page_states() -> st.SearchStrategy[tuple[int, int]]:
    """(bits of Pte, folio order): none often, and any combination of bits, sensible or not."""
    orders = st.integers(ORDER_UNKNOWN, HIGHEST_FILE_ORDER)
    return st.just((0, ORDER_NONE)) | st.tuples(st.integers(1, ALL_BITS), orders)


@st.composite
def pages_of_a_mapping(draw: st.DrawFn, geometry: Geometry) -> tuple[tuple[int, int, int], ...]:
    """Runs for :func:`fakes.page_runs`, of lengths around 1 and around the PMD range, from a small palette."""
    palette = draw(st.lists(page_states(), min_size=1, max_size=4))
    lengths = st.integers(1, 6) | st.integers(geometry.ptes_per_pmd - 2, geometry.ptes_per_pmd + 2)
    runs = draw(st.lists(st.tuples(lengths, st.sampled_from(palette)), min_size=1, max_size=8))
    return tuple((pages, *state) for pages, state in runs)


@st.composite
def address_spaces(draw: st.DrawFn) -> FakeSpace:
    """Return a few mappings anywhere, adjoining or apart."""
    geometry = draw(st.sampled_from(list(GEOMETRIES.values())))
    top = (1 << 64) // geometry.page_size
    address = draw(st.sampled_from([0, 1 << 30, 1 << 50, top - 20 * geometry.ptes_per_pmd])) * geometry.page_size
    text = st.text(max_size=5)
    mappings: list[tuple[Vma, Any, Any]] = []
    for _ in range(draw(st.integers(0, 3))):
        address += draw(st.sampled_from([0, 0, 1, 5, geometry.ptes_per_pmd])) * geometry.page_size
        state, folio_order = page_runs(*draw(pages_of_a_mapping(geometry)))
        end = address + len(state) * geometry.page_size
        if end > 1 << 64:
            break
        vma = Vma(
            address,
            end,
            draw(st.sampled_from(["rw-p", "r-xp", "---p", "rw-s"])),
            draw(text),
            draw(st.sampled_from([kind for kind in VmaKind if kind is not VmaKind.SPECIAL])),
            draw(st.frozensets(st.sampled_from(["rd", "wr", "hg", "nh", "lo"]))),
            draw(st.none() | st.booleans()),
            tuple(draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=2))),
        )
        mappings.append((vma, state, folio_order))
        address = end
    limits = st.integers(0, geometry.ptes_per_pmd - 1)
    return FakeSpace(
        mappings,
        geometry=geometry,
        label=draw(text),
        kernel=draw(text),
        switches=Switches(
            draw(st.sampled_from(TOP_WORDS)),
            draw(st.dictionaries(st.sampled_from(geometry.anon_orders), st.sampled_from(SIZE_WORDS))),
        ),
        tunables=Tunables(
            *draw(st.tuples(limits, limits, limits, st.integers(1, 1 << 40))), defrag=draw(st.booleans())
        ),
        thp_disabled=draw(st.booleans()),
        missing=tuple(draw(st.lists(text, max_size=2))),
    )


@st.composite
def questions(draw: st.DrawFn, space: FakeSpace) -> list[Segment]:
    """Segments in any order, overlapping or not, inside mappings and around them."""
    geometry = space.geometry
    segments = [(vma.start, vma.end) for vma in space.vmas()]
    for vma in draw(st.lists(st.sampled_from(space.vmas()), max_size=4)) if segments else []:
        edges = st.integers(-3, vma.size // geometry.page_size + 3) | st.sampled_from([0, geometry.ptes_per_pmd])
        start, end = sorted(vma.start + draw(edges) * geometry.page_size for _ in range(2))
        segments.append((max(0, start), min(max(0, end), 1 << 64)))
    return draw(st.permutations(segments))


@pytest.fixture(scope="module", params=["x.parquet", "x.mthp"])
def file(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    name: str = request.param
    return tmp_path_factory.mktemp("snapshots") / name


@settings(max_examples=examples(50))
@given(data=st.data(), space=address_spaces(), blocks=st.integers(1, 3))
def test_a_snapshot_reads_as_its_process(file: Path, data: st.DataObject, space: FakeSpace, blocks: int) -> None:
    record(space, file, portion_size=blocks * space.geometry.pmd_size, overwrite=True)
    segments = data.draw(questions(space))
    with load(file) as snapshot:
        for name in ("geometry", "label", "kernel", "switches", "tunables", "thp_disabled", "missing"):
            assert getattr(snapshot, name) == getattr(space, name), name
        assert snapshot.vmas() == space.vmas()
        got, expected = snapshot.read(segments), space.read(segments)
        assert got.segments == expected.segments
        np.testing.assert_array_equal(got.state, expected.state)
        np.testing.assert_array_equal(got.folio_order, expected.folio_order)


@settings(max_examples=examples(40))
@given(data=st.data(), space=address_spaces(), granule_order=st.integers(0, 10))
def test_populated_leaves_out_only_what_reads_as_none(
    file: Path, data: st.DataObject, space: FakeSpace, granule_order: int
) -> None:
    record(space, file, overwrite=True)
    granule = space.geometry.size_of(granule_order)
    segments = data.draw(questions(space))
    with load(file) as snapshot:
        # The fake reads every granule; the snapshot works on runs.
        assert snapshot.populated(segments, granule) == [
            part for segment in segments for part in space.populated([segment], granule)
        ]
