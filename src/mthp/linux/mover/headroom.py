"""Whether there is memory enough to move some: a move takes a second set of pages for a moment.

If that could not be had, the kernel would look for somebody to end (the OOM killer), and within a memory cgroup that
is the target itself.
"""

from __future__ import annotations

from pathlib import Path

from mthp.geometry import format_size
from mthp.linux.freememory import CgroupLimit, parse_meminfo
from mthp.linux.mover.refusal import Refusal


def low_memory(meminfo: str, limit: CgroupLimit | None, needed: int) -> Refusal | None:
    """Whether the machine or the target's memory cgroup has too little memory left.

    Memory of files that the cgroup's processes do not use just now is counted as left: the kernel drops it rather
    than to end a process.

    Args:
        meminfo: text of ``/proc/meminfo``.
        limit: of the memory cgroup.
        needed: bytes.
    """
    available = parse_meminfo(meminfo, "MemAvailable")
    if available is not None and available < needed:
        return Refusal(
            "low_memory",
            f"{format_size(available)} of memory are available, and {format_size(needed)} are wanted for a move",
            "free some memory",
        )
    if limit is None:
        return None
    left = limit.limit - limit.used + _droppable(limit.path)
    if left >= needed:
        return None
    return Refusal(
        "low_cgroup_memory",
        f"{format_size(max(0, left))} of {format_size(limit.limit)} are left in {limit.path}, and"
        f" {format_size(needed)} are wanted for a move",
        "a higher limit there",
    )


def _droppable(cgroup: Path) -> int:
    """Bytes of file memory that a cgroup's reclaim takes first: inactive_file of memory.stat (cgroup-v2.rst)."""
    try:
        words = (line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:
        return 0
    counters = {name: int(value) for name, value in words}
    # Version 1 has the sums of the cgroups below under other names.
    return counters.get("total_inactive_file", counters.get("inactive_file", 0))
