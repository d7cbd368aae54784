"""Find room for the boot code in a target: the zero padding behind the code of its executable, loader or C library.

A segment of code ends somewhere in its last page, and the linker fills the rest of the file's page with zeroes. The
kernel maps that page as a whole, so the padding can be executed, but nothing refers to it.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from mthp.errors import MthpError, UnsupportedError
from mthp.linux.mover.arch.architecture import Architecture
from mthp.linux.mover.mapping import Mapping, read_mappings
from mthp.linux.mover.targetmemory import Reader
from mthp.linux.process import Process

AT_BASE, AT_ENTRY = 7, 9
"""include/uapi/linux/auxvec.h: where the loader was mapped, and where the executable begins to run."""

PT_LOAD, PF_X = 1, 1
"""include/uapi/linux/elf.h."""

MAX_SEGMENTS = 64
"""Program headers that are read at most; executables have about a dozen."""

LONGEST_SEARCH = 1 << 20
"""Bytes of a stack that are searched for a return to a slot."""

_C_LIBRARY = re.compile(r"/(libc\.so\.6|libc-2\.[0-9]+\.so|libc\.musl-[^/]*|ld-musl-[^/]*)$")
_ELF_HEADER = struct.Struct("=16s2HI3QI6H")
_PROGRAM_HEADER = struct.Struct("=2I6Q")


@dataclass(frozen=True, slots=True)
class Padding:
    """Zero padding behind code."""

    start: int
    end: int
    mapping: Mapping

    def slots(self, size: int) -> range:
        """Return the addresses of the slots of `size` bytes in the padding."""
        return range(self.start, self.end - size + 1, size)


def find_padding(process: Process, size: int, read: Reader) -> list[Padding]:
    """Return the paddings of a process with room for a slot, the largest first; raise UnsupportedError without any."""
    mappings = read_mappings(process)
    addresses = _loaded_at(process)
    # A plugin could be unloaded while a thread that lost its tracer is still inside.
    kept = {(each.device, each.inode) for each in mappings if each.inode and _is_kept(each, addresses)}
    found = []
    for mapping in mappings:
        if mapping.permissions == "r-xp" and (mapping.device, mapping.inode) in kept:
            # The file's headers are in its first mapping.
            first = next(each for each in mappings if (each.device, each.inode) == (mapping.device, mapping.inode))
            start = -(-_end_of_code(first, mapping, read) // 64) * 64
            # Only in the last page: more than that cannot be padding.
            if mapping.end - mmap.PAGESIZE < start <= mapping.end - size:
                found.append(Padding(start, mapping.end, mapping))
    if not found:
        process.check_memory()
        raise UnsupportedError(
            f"process {process.label} has no room behind its code for the mover's",
            help=f"use --mechanism madvise; moving takes {size} bytes of padding in executable, loader or C library",
        )
    return sorted(found, key=lambda each: each.start - each.end)


def _loaded_at(process: Process) -> list[int]:
    """Return an address in the executable and one in its loader, if it has one."""
    vector = process.read("auxv")
    words = struct.unpack(f"={len(vector) // 8}Q", vector[: len(vector) // 8 * 8])
    values = dict(zip(words[::2], words[1::2], strict=False))
    return [address for key in (AT_ENTRY, AT_BASE) if (address := values.get(key, 0))]


def _is_kept(mapping: Mapping, addresses: list[int]) -> bool:
    """Return whether a file stays mapped while the program runs: it holds one of `addresses`, or is the C library."""
    inside = any(mapping.start <= address < mapping.end for address in addresses)
    return inside or _C_LIBRARY.search(mapping.name) is not None


def _end_of_code(first: Mapping, mapping: Mapping, read: Reader) -> int:
    """Return the address behind the code of the segment that `mapping` maps; 0 if the file's headers lack it."""
    if first.offset:
        return 0
    try:
        header = _ELF_HEADER.unpack(read(first.start, _ELF_HEADER.size))
        ident, offset, size, count = header[0], header[5], header[9], header[10]
        if ident[:4] != b"\x7fELF" or size != _PROGRAM_HEADER.size or count > MAX_SEGMENTS:
            return 0
        # A hostile header must not lead out of the mapping.
        if offset + size * count > first.end - first.start:
            return 0
        table = read(first.start + offset, size * count)
    except MthpError:
        return 0
    for kind, flags, at, _, _, in_file, in_memory, _ in _PROGRAM_HEADER.iter_unpack(table):
        # Where a segment is larger in memory than in the file, the rest of its last page belongs to the program.
        inside = mapping.offset <= at < mapping.offset + (mapping.end - mapping.start)
        if kind == PT_LOAD and flags & PF_X and inside and in_file == in_memory:
            return int(mapping.start + (at - mapping.offset) + in_file)
    return 0


@dataclass(frozen=True, slots=True)
class Occupant:
    """The thread that left its boot code in a slot.

    Attributes:
        tid: its number, 0 if unknown.
        stack: its stack pointer at that time.
    """

    tid: int
    stack: int


def is_left(slot: range, occupant: Occupant, pointers: Iterable[tuple[int, int, int]], read: Reader) -> bool:
    """Return whether no stopped thread can return to the boot code in a slot.

    Args:
        slot: its addresses.
        pointers: TID, program counter and stack pointer of every thread.
    """
    for tid, pc, stack in pointers:
        if pc in slot:
            return False
        # A signal may have interrupted it while it left: then the frame of the handler, with the address to return to,
        # lies on its stack below the stack pointer that it would have left with.
        if tid != occupant.tid or stack >= occupant.stack:
            continue
        if occupant.stack - stack > LONGEST_SEARCH:
            return False
        try:
            words = np.frombuffer(read(stack, (occupant.stack - stack) // 8 * 8), np.uint64)
        except MthpError:
            return False
        if ((words >= slot.start) & (words < slot.stop)).any():
            return False
    return True


def pack_slot(boot: bytes, tid: int, size: int) -> bytes:
    """Return the bytes for a slot: boot code with its data, and the number of the thread that runs it."""
    return boot.ljust(size - 8, b"\0") + struct.pack("=Q", tid)


def occupant_of(content: bytes, machine: Architecture) -> Occupant | None:
    """Return the thread of the boot code in the slot with `content`; None if it holds no boot code."""
    if not content.startswith(machine.boot):
        return None
    (stack,) = struct.unpack_from("=Q", content, len(machine.boot) + machine.boot_stack)
    (tid,) = struct.unpack_from("=Q", content, machine.slot_bytes - 8)
    return Occupant(tid, stack)
