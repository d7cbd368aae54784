"""How much memory there is for new folios: free blocks by order, what is available, and the memory cgroup's limit.

Free memory is kept by the buddy allocator in aligned blocks of 2**order pages, which ``/proc/buddyinfo`` counts by
NUMA node and zone (proc_buddyinfo(5)). A folio of some order is had at once from a block of that order or a larger
one; otherwise the kernel must compact or reclaim first, which is what makes a collapse stall. The counts are an upper
bound: watermarks, and zones kept for devices, withhold some of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_V1_NO_LIMIT = 1 << 62
"""No limit in a version 1 memory cgroup is the largest number of whole pages, just below 2**63 bytes."""


@dataclass(frozen=True, slots=True)
class FreeBlocks:
    """Free memory of one NUMA node.

    Attributes:
        node: its number.
        blocks: number of free blocks, by order, all zones together.
    """

    node: int
    blocks: tuple[int, ...]

    @property
    def pages(self) -> int:
        """Free base pages."""
        return sum(count << order for order, count in enumerate(self.blocks))

    def folios(self, order: int) -> int:
        """How many folios of `order` could be had at once."""
        return sum(count << larger - order for larger, count in enumerate(self.blocks) if larger >= order)


@dataclass(frozen=True, slots=True)
class CgroupLimit:
    """The limit of a memory cgroup.

    Attributes:
        path: directory of the cgroup that has it.
        limit: bytes.
        used: bytes charged to it.
    """

    path: Path
    limit: int
    used: int


def parse_buddyinfo(text: str) -> tuple[FreeBlocks, ...]:
    """The nodes in a text of ``/proc/buddyinfo``, ascending."""
    nodes: dict[int, list[int]] = {}
    for line in text.splitlines():
        # Node 0, zone   Normal      1   2578 ...
        words = line.split()
        if len(words) < 5 or words[0] != "Node":
            continue
        counts = [int(word) for word in words[4:]]
        blocks = nodes.setdefault(int(words[1].rstrip(",")), [0] * len(counts))
        for order, count in enumerate(counts):
            blocks[order] += count
    return tuple(FreeBlocks(node, tuple(blocks)) for node, blocks in sorted(nodes.items()))


def parse_meminfo(text: str, field: str) -> int | None:
    """One field of ``/proc/meminfo`` in bytes, such as ``"MemAvailable"``; None if it is not there."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) << 10
    return None


def cgroup_limit(mounts: Path, membership: str) -> CgroupLimit | None:
    """The limit that a process runs into first, of its memory cgroup and those above.

    Args:
        mounts: where cgroup file systems are mounted, ``/sys/fs/cgroup``.
        membership: text of the process's ``/proc/PID/cgroup`` (cgroups(7)).

    Returns:
        The one with the least left; None if there is no limit, or no memory cgroup.
    """
    limits = [limit for directory in _directories(mounts, membership, "memory") for limit in _limits_of(directory)]
    return min(limits, key=lambda limit: limit.limit - limit.used, default=None)


def is_frozen(mounts: Path, membership: str) -> bool:
    """Whether the cgroup of a process, or one above it, is frozen (cgroup-v2.rst, freezer-subsystem.rst).

    Args:
        mounts, membership: as for :func:`cgroup_limit`.
    """
    for directory in _directories(mounts, membership, "freezer"):
        for file, word in (("cgroup.freeze", "1"), ("freezer.state", "FROZEN"), ("freezer.state", "FREEZING")):
            with contextlib.suppress(OSError):
                if (directory / file).read_text().strip() == word:
                    return True
    return False


def _directories(mounts: Path, membership: str, controller: str) -> Iterator[Path]:
    """Directories of the cgroup that a process is in as far as `controller` goes, and of all above it.

    In a container the path may be one that only the host knows; of its ancestors here the topmost one is the
    container's own then.
    """
    for line in membership.splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            bases: Iterable[Path] = (mounts, mounts / "unified")
        elif controller in controllers.split(","):
            bases = (mounts / controller,)
        else:
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for base in bases:
            for depth in range(len(parts), -1, -1):
                yield base.joinpath(*parts[:depth])


def _limits_of(directory: Path) -> Iterator[CgroupLimit]:
    """Its limits. Above memory.high a process is made to wait for every page, and so its threads for a move."""
    for limit_file, used_file in (
        ("memory.max", "memory.current"),
        ("memory.high", "memory.current"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError):
            limit, used = (directory / limit_file).read_text().strip(), (directory / used_file).read_text()
            if limit != "max" and int(limit) < _V1_NO_LIMIT:
                yield CgroupLimit(directory, int(limit), int(used))
