"""Plain snapshots and recordings that were altered by hand, or made to hurt their reader."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes import FakeSpace, page_runs
from hostile import JUNK, altered, bomb, damaged, refuses
from mthp.engine.census import take_census
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.errors import UsageError
from mthp.ptes import Pte
from mthp.snapshot import Pace, Recording, load, open_file, record, record_series
from mthp.snapshot.plain import _HEADER, _ROW
from mthp.vma import Vma
from strategies import examples

PAGE = 4096
HEAP = 0x5555_0000_0000
EXAMPLES = settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])


def space() -> FakeSpace:
    vma = Vma(HEAP, HEAP + 512 * PAGE, "rw-p", "[heap]", flags=frozenset({"rd", "hg"}))
    return FakeSpace([(vma, *page_runs((8, Pte.PRESENT, 0), (120, Pte.PRESENT, 2), (384, 0, -1)))])


@pytest.fixture(scope="module", params=["snapshot", "recording"])
def whole(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    path = tmp_path_factory.mktemp("plain") / f"{request.param}.mthp"
    if request.param == "snapshot":
        record(space(), path)
    else:
        record_series(space(), path, Pace(every=0.001, duration=0.003))
    return path


def blocks(path: Path) -> tuple[bytes, list[tuple[Any, int, bytes]]]:
    """Return the first bytes of a plain file, and its blocks: JSON, rows, deflated columns."""
    data = path.read_bytes()
    found, at = [], 8
    while at < len(data):
        said, rows, packed, _ = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        text, columns = data[at : at + said], data[at + said : at + said + packed]
        found.append((json.loads(text or "null"), rows, columns))
        at += said + packed
    return data[:8], found


def block(said: Any, rows: int, columns: bytes) -> bytes:
    text = b"" if said is None else json.dumps(said).encode()
    return _HEADER.pack(len(text), rows, len(columns), zlib.crc32(columns, zlib.crc32(text))) + text + columns


def used_or_refused(path: Path) -> None:
    try:
        if path.read_bytes().startswith(b"mthpstep"):
            recording = Recording(path)
            spaces: list[Any] = [*recording.walk(), recording.space()]
            list(recording.accesses())
        else:
            spaces = [load(path)]
        for opened in spaces:
            take_census(opened)
            plan_space(opened, PlanOptions())
            opened.close()
    except UsageError as error:
        refuses(error)


@EXAMPLES
@given(st.data())
def test_bytes_that_were_altered(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    (tmp_path / "damaged").write_bytes(whole.read_bytes()[:8] + data.draw(damaged(whole.read_bytes()[8:])))
    used_or_refused(tmp_path / "damaged")


@EXAMPLES
@given(st.data())
def test_what_blocks_say_that_was_altered(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    magic, found = blocks(whole)
    changed = [block(data.draw(altered(said)), rows, columns) for said, rows, columns in found]
    (tmp_path / "altered").write_bytes(magic + b"".join(changed))
    used_or_refused(tmp_path / "altered")


@EXAMPLES
@given(st.data())
def test_columns_that_were_altered(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    magic, found = blocks(whole)
    made = []
    for said, rows, columns in found:
        raw = zlib.decompress(columns) if columns else b""
        rows = data.draw(st.sampled_from([rows, 0, 1, rows + 1, 1 << 20, (1 << 32) - 1]))
        made.append(block(said, rows, zlib.compress(data.draw(damaged(raw)))))
    (tmp_path / "altered").write_bytes(magic + b"".join(made))
    used_or_refused(tmp_path / "altered")


@EXAMPLES
@given(key=st.sampled_from(["vmas", "vmas_gone", "counters", "changed", "seconds", "end", "pages"]), junk=JUNK)
def test_a_key_of_another_type(whole: Path, tmp_path: Path, key: str, junk: Any) -> None:
    magic, found = blocks(whole)
    made = [block(said if said is None else said | {key: junk}, rows, columns) for said, rows, columns in found]
    (tmp_path / "altered").write_bytes(magic + b"".join(made))
    used_or_refused(tmp_path / "altered")


def test_a_snapshot_that_is_cut_short_or_altered_anywhere_is_refused(tmp_path: Path) -> None:
    record(space(), tmp_path / "x.mthp")
    data = (tmp_path / "x.mthp").read_bytes()
    for size in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:size])
        with pytest.raises(UsageError, match=r"damaged|not a snapshot"):
            load(tmp_path / "cut")
    for at in range(len(data)):
        (tmp_path / "flipped").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(UsageError, match=r"damaged|not a snapshot|too many|not a recording"):
            open_file(tmp_path / "flipped")


@pytest.mark.slow
@pytest.mark.parametrize(
    "evil",
    [
        lambda rows: block(None, rows, zlib.compress(bytes(1 << 30), 9)),
        lambda rows: _HEADER.pack(0, rows, 2 * _ROW * rows, 0),
        lambda rows: _HEADER.pack((1 << 32) - 1, 0, 0, 0),
        lambda rows: _HEADER.pack(0, (1 << 32) - 1, 1 << 40, 0),
        lambda rows: block(None, 1, zlib.compress(bytes(_ROW))) * rows,
    ],
)
def test_a_bomb_is_refused(evil: Callable[[int], bytes], tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    path.write_bytes(b"mthpruns" + evil(1 << 17))
    bomb(path, "inspect", path, memory=3 << 29)
