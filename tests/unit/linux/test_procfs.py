"""Mappings from the text of smaps, maps, numa_maps and mountinfo."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mthp.linux.process import ProcStat
from mthp.linux.procfs import VmaParser, number_in, parse_numa_line, pmd_mapped, shmem_devices, split_records
from mthp.vma import Vma, VmaKind

SMAPS = b"""\
00400000-00600000 r-xp 00001000 fe:00 1234                               /usr/bin/a b (deleted)
Size:               2048 kB
Rss:                 100 kB
Anonymous:             0 kB
AnonHugePages:         0 kB
Swap:                  0 kB
THPeligible:           0
VmFlags: rd ex mr mw me
7f0000000000-7f0000400000 rw-p 00000000 00:00 0
Size:               4096 kB
Rss:                3072 kB
Anonymous:          3072 kB
LazyFree:              8 kB
AnonHugePages:      2048 kB
Swap:                 12 kB
THPeligible:           1
VmFlags: rd wr mr mw me ac hg
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
VmFlags: ex
"""


def parse(text: bytes, devices: frozenset[str] = frozenset()) -> list[Vma]:
    parser = VmaParser(devices)
    return [parser.parse(header, block) for header, block in split_records(iter([text]))]


def kind_of(line: str, flags: str = "rd wr") -> VmaKind:
    (vma,) = parse(f"{line}\nVmFlags: {flags} \n".encode(), frozenset({"00:1b"}))
    return vma.kind


def test_smaps() -> None:
    code, heap, vsyscall = parse(SMAPS)
    assert (code.start, code.end, code.permissions) == (0x400000, 0x600000, "r-xp")
    assert (code.name, code.kind) == ("/usr/bin/a b (deleted)", VmaKind.FILE)
    assert code.flags == {"rd", "ex", "mr", "mw", "me"}
    assert code.has_anon_vma is None
    assert (heap.name, heap.kind, heap.has_anon_vma) == ("", VmaKind.ANON, True)
    assert "hg" in heap.flags
    assert (vsyscall.start, vsyscall.kind) == (0xFFFFFFFFFF600000, VmaKind.SPECIAL)


def test_counters() -> None:
    code, heap, vsyscall = (block for _, block in split_records(iter([SMAPS])))
    assert number_in(heap, b"\nRss:") == number_in(heap, b"\nAnonymous:") == 3072
    assert [number_in(block, b"\nTHPeligible:") for block in (code, heap, vsyscall)] == [0, 1, None]
    assert [pmd_mapped(block) for block in (code, heap, vsyscall)] == [0, 2 << 20, 0]


@given(sizes=st.lists(st.integers(1, 200), min_size=1, max_size=40))
def test_the_size_of_the_pieces_does_not_matter(sizes: list[int]) -> None:
    pieces, at = [], 0
    while at < len(SMAPS):
        for size in sizes:
            pieces.append(SMAPS[at : at + size])
            at += size
    parser = VmaParser()
    assert [parser.parse(*record) for record in split_records(iter(pieces))] == parse(SMAPS)


def test_a_text_that_ends_early_keeps_what_was_whole() -> None:
    for end in range(len(SMAPS)):
        vmas = parse(SMAPS[:end])
        assert [vma.start for vma in vmas] == [vma.start for vma in parse(SMAPS)][: len(vmas)]


def test_maps_has_no_flags() -> None:
    lines = b"\n".join(line for line in SMAPS.splitlines() if b"-" in line.split(b" ")[0]) + b"\n"
    assert [(vma.start, vma.flags) for vma in parse(lines)] == [(vma.start, frozenset()) for vma in parse(SMAPS)]


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("1000-2000 rw-p 00000000 00:00 0 ", VmaKind.ANON),
        ("1000-2000 rw-p 00000000 00:00 0          [heap]", VmaKind.ANON),
        ("1000-2000 rw-p 00000000 00:00 0          [stack]", VmaKind.ANON),
        ("1000-2000 rw-p 00000000 00:00 0          [anon:glibc: malloc arena]", VmaKind.ANON),
        ("1000-2000 rw-p 00000000 00:06 5          /dev/zero", VmaKind.ANON),
        ("1000-2000 rw-s 00000000 00:01 1027       /dev/zero (deleted)", VmaKind.SHMEM),
        ("1000-2000 rw-s 00000000 00:01 1027       [anon_shmem:pool]", VmaKind.SHMEM),
        ("1000-2000 rw-s 00000000 00:01 9          /memfd:x (deleted)", VmaKind.SHMEM),
        ("1000-2000 rw-s 00000000 00:01 9          /SYSV00000000 (deleted)", VmaKind.SHMEM),
        ("1000-2000 rw-s 00000000 00:17 9          /dev/shm/x", VmaKind.SHMEM),
        ("1000-2000 rw-p 00000000 00:1b 9          /run/on-tmpfs", VmaKind.SHMEM),
        ("1000-2000 r--p 00000000 fe:00 9          /usr/lib/libc.so.6", VmaKind.FILE),
        ("1000-2000 rw-s 00000000 00:0f 9          /anon_hugepage (deleted)", VmaKind.HUGETLB),
        ("1000-2000 r--p 00000000 00:00 0          [vvar]", VmaKind.SPECIAL),
        ("1000-2000 r-xp 00000000 00:00 0          [vdso]", VmaKind.SPECIAL),
        ("1000-2000 rw-s 00000000 00:0e 77         anon_inode:[io_uring]", VmaKind.SPECIAL),
    ],
)
def test_kinds(line: str, kind: VmaKind) -> None:
    assert kind_of(line) is kind


def test_flags_overrule_names() -> None:
    assert kind_of("1000-2000 rw-s 00000000 00:06 5  /dev/dri/card0", "rd wr sh io pf") is VmaKind.SPECIAL
    assert kind_of("1000-2000 rw-s 00000000 00:0f 9  /mnt/huge/x", "rd wr ht") is VmaKind.HUGETLB


def test_a_name_with_a_newline_and_odd_bytes() -> None:
    (vma,) = parse(b"1000-2000 r--p 00000000 fe:00 9   /tmp/two\\012lines \xff\n")
    assert vma.name == "/tmp/two\nlines \udcff"


def test_shared_memory_swapped_out_was_not_written_here() -> None:
    (vma,) = parse(b"1000-2000 rw-s 00000000 00:01 9   /memfd:x (deleted)\nSwap:    8 kB\nVmFlags: rd\n")
    assert vma.has_anon_vma is None


def test_numa_maps() -> None:
    line = b"7f0000000000 default anon=600 dirty=600 active=0 N0=512 N1=88 kernelpagesize_kB=4"
    assert parse_numa_line(line, 4096) == (0x7F0000000000, ((0, 512), (1, 88)))
    huge = b"7f0000000000 bind:1 file=/anon_hugepage\\040(deleted) huge dirty=2 N1=2 kernelpagesize_kB=2048"
    assert parse_numa_line(huge, 4096) == (0x7F0000000000, ((1, 1024),))
    assert parse_numa_line(b"7fff0000 default", 4096) == (0x7FFF0000, ())


def test_mountinfo() -> None:
    text = (
        b"22 27 0:21 / /proc rw - proc proc rw\n"
        b"25 24 0:27 / /dev/shm rw shared:5 - tmpfs tmpfs rw\n"
        b"27 1 254:0 / / rw - ext4 /dev/vda rw\n"
    )
    assert shmem_devices(text) == {"00:1b"}


def test_a_stat_line_with_a_difficult_name() -> None:
    fields = " ".join(str(number) for number in range(4, 53))
    stat = ProcStat.parse(f"1234 (a) S (b)) Z {fields}\n".encode())
    assert stat.state == "Z"
    # Fields are numbered as in proc_pid_stat(5): flags is the 9th, starttime the 22nd.
    assert (stat.flags, stat.starttime) == (9, 22)
