"""Measure the room for new folios: free blocks of the machine, and the remainder below the limits of a process.

A page is charged to the memory cgroup of the process and to all above it. At the limit of any of them the kernel
reclaims memory, and kills a process of it if that does not help (try_charge_memcg(), mm/memcontrol.c).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from mthp.budget import MACHINE, MemoryBound
from mthp.freememory import FreeMemory, parse_free_memory
from mthp.linux.cgroups import CgroupMount, cgroup_directories, cgroup_mounts
from mthp.linux.kernelfiles import text_of


def free_memory(proc: Path = Path("/proc")) -> FreeMemory | None:
    """Return the free memory of the machine; None if it cannot be seen."""
    buddyinfo, zoneinfo = (text_of(proc / name) for name in ("buddyinfo", "zoneinfo"))
    return parse_free_memory(buddyinfo, zoneinfo) if buddyinfo and zoneinfo else None


def parse_meminfo(text: str, field: str) -> int | None:
    """Return a field of ``/proc/meminfo`` in bytes, such as ``"MemAvailable"``; None if it is missing."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) << 10
    return None


_V1_NO_LIMIT = 1 << 62
"""Bytes from which a limit of version 1 means none: the kernel then shows the last whole page below 2**63 bytes."""

_FILES = (
    ("memory.max", "memory.current"),
    # Above it threads wait for every page, also those for which a collapse works (try_charge_memcg()).
    ("memory.high", "memory.current"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    # Memory and swap together; swapping pages out does not lower it.
    ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes"),
)


def memory_bounds(membership: str, proc: Path = Path("/proc")) -> list[MemoryBound]:
    """Return the limits for a process.

    Args:
        membership: text of its ``/proc/PID/cgroup``.
        proc: mount point of proc, for the machine's memory and the mounts of this process.
    """
    mounts = cgroup_mounts(text_of(proc / "self/mountinfo") or "")
    return [*machine_bounds(text_of(proc / "meminfo") or ""), *cgroup_bounds(mounts, membership)]


def machine_bounds(meminfo: str) -> list[MemoryBound]:
    """Return the machine's memory as a limit, from a text of ``/proc/meminfo``; empty if the text lacks it."""
    total, available = parse_meminfo(meminfo, "MemTotal"), parse_meminfo(meminfo, "MemAvailable")
    return [] if total is None or available is None else [MemoryBound(MACHINE, total, available)]


def cgroup_bounds(mounts: Sequence[CgroupMount], membership: str) -> Iterator[MemoryBound]:
    """Return the limits of the memory cgroup of a process, and of all above it."""
    for directory in cgroup_directories(mounts, membership, "memory"):
        droppable: int | None = None
        for limit_file, used_file in _FILES:
            with contextlib.suppress(OSError, ValueError):
                limit, used = (directory / limit_file).read_text().strip(), int((directory / used_file).read_text())
                if limit == "max" or int(limit) >= _V1_NO_LIMIT:
                    continue
                if droppable is None:
                    droppable = _droppable(directory)
                # Clean, inactive file pages do not count as used: at the limit, reclaim drops them first.
                yield MemoryBound(str(directory), int(limit), int(limit) - used + droppable)


def _droppable(cgroup: Path) -> int:
    """Return the bytes of file memory that reclaim takes first: inactive and clean (memory.stat, cgroup-v2.rst)."""
    words = (text_of(cgroup / "memory.stat") or "").split()
    counters = dict(zip(words[::2], words[1::2], strict=False))

    def bytes_of(name: str, name_v1: str) -> int:
        # Version 1 has the sums over the cgroups below under other names.
        return int(counters.get(f"total_{name_v1}", counters.get(name, 0)))

    unclean = bytes_of("file_dirty", "dirty") + bytes_of("file_writeback", "writeback")
    return max(0, bytes_of("inactive_file", "inactive_file") - unclean)
