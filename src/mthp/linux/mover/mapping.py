"""Read the mappings of a process without their flags: all from /proc/PID/maps, or one by PROCMAP_QUERY."""

from __future__ import annotations

import fcntl
import itertools
import struct
from dataclasses import dataclass, field

from mthp.linux.process import Process
from mthp.text import lines

PROCMAP_QUERY = 0xC0686611
"""``_IOWR('f', 17, struct procmap_query)``, include/uapi/linux/fs.h, Linux 6.11."""

_PROCMAP = struct.Struct("=9Q4I2Q")
"""``struct procmap_query``: size, query_flags, query_addr, vma_start, vma_end, vma_flags, vma_page_size, vma_offset,
inode, dev_major, dev_minor, vma_name_size, build_id_size, vma_name_addr, build_id_addr."""

_READABLE, _WRITABLE, _EXECUTABLE, _SHARED = 1, 2, 4, 8
"""``PROCMAP_QUERY_VMA_*``."""


@dataclass(frozen=True, slots=True)
class Mapping:
    """A line of /proc/PID/maps.

    Attributes:
        permissions: letters such as ``rw-p``.
        offset: offset in the file, in bytes.
        device, inode: those of the file; an inode of 0 means no file.
        name: path of the file; "" where it was not queried; not compared.
    """

    start: int
    end: int
    permissions: str
    offset: int
    device: tuple[int, int]
    inode: int
    name: str = field(default="", compare=False)

    @classmethod
    def parse(cls, line: bytes) -> Mapping:
        """Read a line of /proc/PID/maps."""
        span, permissions, offset, device, inode, *name = line.split(maxsplit=5)
        start, end = (int(word, 16) for word in span.split(b"-"))
        major, minor = (int(word, 16) for word in device.split(b":"))
        text = name[0].decode(errors="replace") if name else ""
        return cls(start, end, permissions.decode(), int(offset, 16), (major, minor), int(inode), text)


def read_mappings(process: Process) -> list[Mapping]:
    """Return all mappings of `process`, ascending."""
    return [Mapping.parse(line) for line in lines(process.read("maps"))]


def query_mapping(process: Process, maps: int, address: int) -> Mapping | None:
    """Return the mapping that covers `address`, or None.

    Args:
        maps: a descriptor of its /proc/PID/maps, opened since it executed its program.
    """
    # Without sizes for name and build ID, which would take the kernel longer (do_procmap_query(), fs/proc/task_mmu.c).
    request = bytearray(_PROCMAP.pack(_PROCMAP.size, 0, address, *(0,) * 6, *(0,) * 4, 0, 0))
    try:
        fcntl.ioctl(maps, PROCMAP_QUERY, request)
    except FileNotFoundError:
        return None
    except OSError:
        # The kernel is older than 6.11.
        return next((each for each in read_mappings(process) if each.start <= address < each.end), None)
    _, _, _, start, end, flags, _, offset, inode, major, minor, *_ = _PROCMAP.unpack(request)
    letters = zip((_READABLE, _WRITABLE, _EXECUTABLE), "rwx", strict=True)
    permissions = "".join(letter if flags & bit else "-" for bit, letter in letters)
    return Mapping(start, end, permissions + ("s" if flags & _SHARED else "p"), offset, (major, minor), inode)


def find_gap(mappings: list[Mapping], size: int, alignment: int) -> int:
    """Return an aligned address in the middle of the largest gap between `mappings`; 0 if `size` does not fit.

    There it does not limit the growth of the heap, of a stack or of the mappings.
    """
    gaps = ((after.start - before.end, before.end) for before, after in itertools.pairwise(mappings))
    # The last mapping may be the vsyscall page of x86, above all addresses that a program can map.
    # Twice the alignment more, so that an aligned address in the middle has room on both sides.
    fitting = [gap for gap in gaps if gap[0] >= size + 2 * alignment and gap[1] + gap[0] < 1 << 56]
    if not fitting:
        return 0
    length, start = max(fitting)
    return (start + (length - size) // 2) // alignment * alignment
