"""Read the mappings of a process: smaps, maps, numa_maps and mountinfo as :class:`~mthp.vma.Vma` and totals.

smaps is the one file with the VmFlags line, and so with MADV_HUGEPAGE and all other flags that decide about THP. It is
text, about 800 bytes a mapping, and a process can have 65 530 mappings and more. So it is read in pieces, and a few
searches extract just the wanted fields of each mapping.

The list is not a snapshot: the kernel writes it piece by piece, and the process may map and unmap meanwhile. The kernel
promises (Documentation/filesystems/proc.rst, "/proc/PID/maps") that ranges ascend and do not overlap.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator

from mthp.errors import UnsupportedError
from mthp.linux.kernelfiles import unescaped
from mthp.linux.process import Process
from mthp.ptes import Segment
from mthp.text import lines
from mthp.vma import Vma, VmaKind

_READ_CHUNK = 1 << 20
_HEADER = re.compile(rb"^([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) ([0-9a-f]+:[0-9a-f]+) (\d+) *(.*)$", re.MULTILINE)
_SHMEM_NAMES = ("/memfd:", "/SYSV", "/dev/shm/", "[anon_shmem:")
_ANON_NAMES = ("[heap]", "[stack", "[anon:")
_SHMEM_FILESYSTEMS = (b"tmpfs", b"devtmpfs")
_NO_FLAGS: frozenset[str] = frozenset()
_PMD_MAPPED = (b"\nAnonHugePages:", b"\nShmemPmdMapped:", b"\nFilePmdMapped:")


def read_vmas(process: Process) -> list[Vma]:
    """Return the mappings of `process`, by ascending address."""
    return [vma for vma, _ in read_smaps(process)]


def read_pmd_mapped(process: Process) -> list[tuple[Vma, int]]:
    """Return the mappings of which PMD entries map a part, with the bytes that they map, of any kind of memory."""
    return [(vma, mapped) for vma, block in read_smaps(process) if (mapped := pmd_mapped(block))]


def read_mapped(process: Process) -> list[Segment]:
    """Return the mapped ranges of addresses, one for each mapping: a small part of the work of :func:`read_vmas`."""
    segments = [(int(match[1], 16), int(match[2], 16)) for match in _HEADER.finditer(process.read("maps"))]
    if not segments:
        process.check_memory()
    return segments


def is_mapped(process: Process, start: int, end: int) -> bool:
    """Return whether mappings cover all of `start` to `end` at this moment."""
    for low, high in read_mapped(process):
        if low <= start < high:
            start = high
    return start >= end


def read_numa(process: Process, page_size: int) -> dict[int, tuple[tuple[int, int], ...]]:
    """Return base pages by NUMA node for each mapping, by its start address; empty on kernels without NUMA.

    The kernel walks the page tables of the whole process for this, about as long as for smaps.
    """
    try:
        text = process.read("numa_maps")
    except UnsupportedError:
        return {}
    return dict(parse_numa_line(line, page_size) for line in lines(text) if line)


def parse_numa_line(line: bytes, page_size: int) -> tuple[int, tuple[tuple[int, int], ...]]:
    """Return start address and base pages by node of one line of numa_maps (numa(7)).

    The kernel counts in pages of ``kernelpagesize_kB``, which for hugetlbfs is not the base page.
    """
    words = line.split()
    nodes = []
    unit = page_size
    for word in words[2:]:
        name, _, value = word.partition(b"=")
        if name == b"kernelpagesize_kB":
            unit = int(value) << 10
        elif name[:1] == b"N" and name[1:].isdigit():
            nodes.append((int(name[1:]), int(value)))
    return int(words[0], 16), tuple((node, count * unit // page_size) for node, count in nodes)


def pmd_mapped(block: bytes) -> int:
    """Return the bytes that PMD entries map, of any kind, from one mapping's part of smaps."""
    return sum(number_in(block, name) or 0 for name in _PMD_MAPPED) << 10


def shmem_devices(mountinfo: bytes) -> frozenset[str]:
    """Return the device numbers of the tmpfs mounts in a mountinfo text, as maps writes them (``"00:1b"``)."""
    devices = set()
    for line in lines(mountinfo):
        mount, _, source = line.partition(b" - ")
        if source.split(b" ", 1)[0] in _SHMEM_FILESYSTEMS:
            major, _, minor = mount.split()[2].partition(b":")
            # mountinfo has decimal numbers, maps hexadecimal ones.
            devices.add(f"{int(major):02x}:{int(minor):02x}")
    return frozenset(devices)


class VmaParser:
    """A parser that makes a :class:`~mthp.vma.Vma` of one mapping's part of smaps, or of a line of maps.

    Processes with many mappings have few different names and flag lines, so the results for those are kept.

    Args:
        shmem_devices: devices of files that are shared memory, as :func:`shmem_devices` returns them.
    """

    def __init__(self, shmem_devices: frozenset[str] = frozenset()) -> None:
        self._shmem_devices = shmem_devices
        self._flags: dict[bytes, frozenset[str]] = {}
        self._names: dict[bytes, str] = {}

    def parse(self, header: re.Match[bytes], block: bytes) -> Vma:
        """Return the mapping of a header line (a match of the module's pattern) and the lines up to the next one."""
        start, end, permissions, offset, device, inode, raw_name = header.groups()
        if (name := self._names.get(raw_name)) is None:
            name = self._names[raw_name] = unescaped(os.fsdecode(raw_name))
        flags = self._parse_flags(block)
        shared = permissions.endswith(b"s")
        written = any(number_in(block, field) for field in (b"\nAnonymous:", b"\nSwap:", b"\nAnonHugePages:"))
        kind = self._kind(name, flags, device.decode(), shared=shared, has_file=inode != b"0")
        return Vma(
            start=int(start, 16),
            end=int(end, 16),
            permissions=permissions.decode(),
            name=name,
            kind=kind,
            offset=int(offset, 16) if inode != b"0" else 0,
            flags=flags,
            # Memory written once and empty now looks like memory never written: "Anonymous: 0 kB" proves nothing. In
            # shared memory the swapped pages are those of the file.
            has_anon_vma=True if written and kind is not VmaKind.SHMEM else None,
        )

    def _parse_flags(self, block: bytes) -> frozenset[str]:
        # From the end: it is the last line of a mapping.
        at = block.rfind(b"VmFlags:")
        if at < 0:
            return _NO_FLAGS
        line = block[at + 8 : block.find(b"\n", at)]
        if (flags := self._flags.get(line)) is None:
            flags = self._flags[line] = frozenset(line.decode().split())
        return flags

    def _kind(self, name: str, flags: frozenset[str], device: str, *, shared: bool, has_file: bool) -> VmaKind:
        # Without flags the name shows it (HUGETLB_ANON_FILE, include/linux/hugetlb.h).
        if "ht" in flags or name.startswith("/anon_hugepage"):
            return VmaKind.HUGETLB
        # VM_IO and VM_PFNMAP: memory of devices, without pages that khugepaged could take.
        if "io" in flags or "pf" in flags:
            return VmaKind.SPECIAL
        if name.startswith(_SHMEM_NAMES):
            return VmaKind.SHMEM
        if name.startswith("/dev/zero"):
            # A private mapping of /dev/zero is plain anonymous memory that kept the name (mmap_zero, char/mem.c).
            return VmaKind.SHMEM if shared else VmaKind.ANON
        if name.startswith(_ANON_NAMES) or not (name or has_file or shared):
            return VmaKind.ANON
        if name.startswith("/"):
            return VmaKind.SHMEM if device in self._shmem_devices else VmaKind.FILE
        return VmaKind.SPECIAL


def split_records(pieces: Iterator[bytes]) -> Iterator[tuple[re.Match[bytes], bytes]]:
    """Cut smaps or maps text, which comes in `pieces` of any size, into (header match, its block).

    An incomplete last line is left out.
    """
    rest = b""
    for piece in pieces:
        text = rest + piece
        # The last mapping may continue in the next piece.
        headers = list(_HEADER.finditer(text, 0, text.rfind(b"\n") + 1))
        if not headers:
            rest = text
            continue
        for header, following in itertools.pairwise(headers):
            yield header, text[header.start() : following.start()]
        rest = text[headers[-1].start() :]
    rest = rest[: rest.rfind(b"\n") + 1]
    if last := _HEADER.match(rest):
        yield last, rest


def read_smaps(process: Process) -> Iterator[tuple[Vma, bytes]]:
    """Yield the mappings of `process`, by ascending address, each with its part of smaps."""
    parser = VmaParser(shmem_devices(_mountinfo(process)))
    empty = True
    for header, block in split_records(_pieces(process)):
        empty = False
        yield parser.parse(header, block), block
    # The list of an exiting process is empty, or ends early.
    if empty:
        process.check_memory()
    process.check_alive()


def _pieces(process: Process) -> Iterator[bytes]:
    try:
        fd = process.open("smaps")
    except UnsupportedError:
        # Without CONFIG_PROC_PAGE_MONITOR there is no smaps: maps has the same list without flags.
        fd = process.open("maps")
    parts: list[bytes] = []
    size = 0
    try:
        # One read returns about a page of text, whatever the size: gather several for the search.
        while part := os.read(fd, _READ_CHUNK):
            parts.append(part)
            size += len(part)
            if size >= _READ_CHUNK:
                yield b"".join(parts)
                parts, size = [], 0
    except OSError as error:
        process.fail(error, "its mappings")
    finally:
        os.close(fd)
    yield b"".join(parts)


def _mountinfo(process: Process) -> bytes:
    try:
        return process.read("mountinfo")
    except UnsupportedError:
        return b""


def number_in(block: bytes, field: bytes) -> int | None:
    """Return a counter in one mapping's part of smaps, most of them in KiB; None if the kernel does not have it.

    Args:
        field: its name, between the preceding newline and a colon, both included.
    """
    at = block.find(field)
    if at < 0:
        return None
    at += len(field)
    return int(block[at : block.index(b"\n", at)].removesuffix(b"kB"))
