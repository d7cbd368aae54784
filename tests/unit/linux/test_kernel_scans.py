"""Tracepoints on fake machines: formats of several releases, the ring of perf, and the parsed events."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mthp.errors import NotPermittedError, UnsupportedError
from mthp.geometry import X86_64
from mthp.linux.abi import PERF_RECORD_LOST, PERF_RECORD_SAMPLE
from mthp.linux.heat.frames import Frames
from mthp.linux.kernel_scans import COLLAPSE, KHUGEPAGED, SCAN, Scan, Threads, Visits, Watched, attributed
from mthp.linux.tracepoints import Event, Format, read_formats, take_records, tracefs
from mthp.results import ScanResult

BASE, PAGE, PMD = 1 << 40, X86_64.page_size, X86_64.pmd_size
OWN, OTHER = 0xFFFF888000000000, 0xFFFF888000000800
NO_FRAME = (1 << 64) - 1
COMMON = [("unsigned short common_type", 2, 0), ("int common_pid", 4, 1)]
SIX = [*COMMON, ("struct mm_struct * mm", 8, 0), ("unsigned long pfn", 8, 0), ("int status", 4, 1)]
FIVE = [*SIX[:-1], ("bool writable", 1, 0), *SIX[-1:]]
"""Earlier releases also have whether a page was writable."""
FILE = [*SIX[:-1], ("__data_loc char[] filename", 4, 0), *SIX[-1:]]


def a_format(fields: Sequence[tuple[str, int, int]], name: str = SCAN, number: int = 759) -> str:
    """The text of a file ``format`` with `fields` (declaration, size, whether it is signed), each where C puts it."""
    lines, at = [f"name: {name}", f"ID: {number}", "format:"], 0
    for declared, size, signed in fields:
        at = -(-at // size) * size
        lines.append(f"\tfield:{declared};\toffset:{at};\tsize:{size};\tsigned:{signed};")
        at += size
    words = ", ".join(f'{{{3 * result}, "{result.trace_word}"}}' for result in ScanResult)
    lines += ["", f'print fmt: "mm=%p, status=%s", REC->mm, __print_symbolic(REC->status, {words})']
    return "\n".join(lines)


@pytest.mark.parametrize("fields", [SIX, FIVE, FILE])
def test_records_are_read_as_the_format_of_the_release_says(fields: list[tuple[str, int, int]]) -> None:
    found = Format.parse(a_format(fields))
    data = bytearray(64)
    wanted = {"common_pid": 52, "mm": OWN, "pfn": NO_FRAME, "status": 3 * ScanResult.EXCEED_NONE_PTE}
    for name, value in wanted.items():
        offset, code = found.fields[name]
        struct.pack_into("=" + code, data, offset, value)
    assert (found.name, found.number) == (SCAN, 759)
    assert "filename" not in found.fields
    values = found.read(bytes(data))
    assert values | {"status": 0} == values | wanted | {"status": 0}
    assert values["status"] == ScanResult.EXCEED_NONE_PTE.trace_word


def test_a_number_without_a_word_stays_one() -> None:
    assert Format.parse(a_format(SIX)).read(struct.pack("=HxxiQQi4x", 0, 0, 0, 0, 1))["status"] == 1


@pytest.mark.parametrize("text", ["", "name: x\n", "ID: 5\n", "\0\xff"])
def test_what_is_no_format(text: str) -> None:
    with pytest.raises(ValueError, match="without a name"):
        Format.parse(text)


def test_events_that_a_kernel_lacks_are_left_out(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError):
        read_formats(tmp_path, "huge_memory", (SCAN,))
    path = tmp_path / "events/huge_memory" / SCAN / "format"
    path.parent.mkdir(parents=True)
    path.write_text(a_format(SIX))
    assert [each.name for each in read_formats(tmp_path, "huge_memory", (SCAN, COLLAPSE))] == [SCAN]


def test_formats_that_may_not_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> str:
        raise PermissionError

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(NotPermittedError):
        read_formats(Path("/nowhere"), "huge_memory", (SCAN,))


def test_where_tracefs_is_mounted(tmp_path: Path) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text("proc /proc proc rw 0 0\n")
    with pytest.raises(UnsupportedError, match="not mounted"):
        tracefs(mounts)
    mounts.write_text("proc /proc proc rw 0 0\nnodev /a\\040b/tracing tracefs rw 0 0\n")
    assert tracefs(mounts) == Path("/a b/tracing")


def test_records_are_taken_across_the_end_of_the_ring() -> None:
    size, begin = mmap.PAGESIZE, mmap.PAGESIZE - 16
    bodies = [struct.pack("=QI20s", time, 20, bytes([time]) * 20) for time in (1, 2)]
    records = [struct.pack("=IHH", PERF_RECORD_SAMPLE, 0, 8 + len(body)) + body for body in bodies]
    records.insert(1, struct.pack("=IHHQQ", PERF_RECORD_LOST, 0, 24, 7, 41))
    text = b"".join(records)
    with mmap.mmap(-1, mmap.PAGESIZE + size) as ring:
        for at, byte in enumerate(text):
            ring[mmap.PAGESIZE + (begin + at) % size] = byte
        struct.pack_into("=QQ", ring, 1024, begin + len(text), begin)
        assert take_records(ring) == (bodies, 41)
        assert take_records(ring) == ([], 0)


def frames(*pages: int, first: int = 1000) -> Frames:
    """Consecutive frames from `first` on, behind the pages with these numbers from `BASE`."""
    address = np.array([BASE + page * PAGE for page in pages], np.uint64)
    return Frames(address, np.arange(first, first + len(pages)).astype(np.uint64))


def scan(frame: int, space: int = OWN, word: str = "succeeded", by: str = KHUGEPAGED) -> Scan:
    return Scan(space, frame, by, word, collapsing=False)


def test_the_space_with_most_of_the_frames_is_the_own() -> None:
    # The frame 1001 went to another process meanwhile; the scan without a frame is of the same space as the others.
    scans = [scan(1000), scan(1001, OTHER), scan(1512), scan(NO_FRAME), scan(NO_FRAME, OTHER), scan(5)]
    scans[-1] = scan(5, OTHER)
    found, others = attributed(scans, [frames(*range(1024))], PMD, None)
    assert [address for address, _ in found] == [BASE, BASE + PMD, None]
    assert others == 3


def test_pages_that_moved_are_known_by_either_look() -> None:
    looks = [frames(0, 1), frames(0, 1, first=3000)]
    found, _ = attributed([scan(1000), scan(3001)], looks, PMD, None)
    assert [address for address, _ in found] == [BASE, BASE]


def test_within_a_range_scans_of_others_are_left_out() -> None:
    found, others = attributed([scan(1000), scan(77), scan(78, OTHER)], [frames(0, 1)], PMD, (BASE, BASE + PMD))
    assert [address for address, _ in found] == [BASE]
    assert others == 1


def test_a_scan_follows_its_attempts(tmp_path: Path) -> None:
    def event(name: str, tid: int) -> Event:
        return Event(0, name, {"common_pid": tid, "mm": OWN, "pfn": 1, "status": "page_locked"})

    visits = Visits()
    visits.take([event(COLLAPSE, 1), event(SCAN, 2), event(SCAN, 1), event(SCAN, 1)], Threads(tmp_path))
    assert [each.collapsing for each in visits.scans] == [False, True, False]
    assert "while it was being collapsed" in visits.scans[1].outcome
    assert {each.by for each in visits.scans} == {""}


def test_threads_are_named_in_the_first_namespace_alone(tmp_path: Path) -> None:
    (tmp_path / "self/ns").mkdir(parents=True)
    (tmp_path / "self/ns/pid").symlink_to("pid:[4026531836]")
    for tid, name in ((52, KHUGEPAGED), (99, "java")):
        (tmp_path / str(tid)).mkdir()
        (tmp_path / str(tid) / "comm").write_text(name + "\n")
    threads = Threads(tmp_path)
    assert [threads[52], threads[99], threads[7]] == [KHUGEPAGED, "java (99)", "a process that is gone (7)"]
    (tmp_path / "self/ns/pid").unlink()
    (tmp_path / "self/ns/pid").symlink_to("pid:[4026532000]")
    assert Threads(tmp_path)[52] == ""


def described(*scans: tuple[int | None, Scan], others: int = 0, lost: int = 0, visible: bool = True) -> str:
    return " / ".join(Watched(5.0, scans, others, lost, visible, "10000").sentences)


def test_scans_are_described_in_sentences() -> None:
    refused = scan(1, word=ScanResult.EXCEED_NONE_PTE.trace_word)
    said = described(
        *((BASE + at * PMD, refused) for at in range(5)), (BASE, scan(1, by="java (99)")), (None, scan(1, by=""))
    )
    assert f"khugepaged scanned 5 times at {BASE:#x}" in said
    assert "and 2 more: left alone, EXCEED_NONE_PTE: " in said
    assert f"MADV_COLLAPSE of java (99) scanned once at {BASE:#x}: collapsed" in said
    assert "the kernel scanned once where it names no page: collapsed" in said


def test_why_nothing_was_seen_is_explained() -> None:
    assert "12 times in other processes; khugepaged rests 10000 ms" in described(others=12)
    assert "is of this process alone" in described(visible=False)
    assert "3 events were lost" in described(lost=3)


def test_a_word_of_a_later_release_is_shown_as_it_is() -> None:
    assert scan(1, word="too_hot_to_handle").outcome == "left alone, too hot to handle"
