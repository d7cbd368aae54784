"""Where the control groups of a process are, of version 1, version 2, or both side by side.

``/proc/PID/cgroup`` has the path of a process in each hierarchy, and ``/proc/self/mountinfo`` what part of a hierarchy
is mounted where (cgroups(7), proc_pid_mountinfo(5)). Both are relative to the cgroup namespace of the process that
reads them (cgroup_show_path() and proc_cgroup_show(), kernel/cgroup/cgroup.c), so they fit together in a container too.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mthp.text import lines

_ESCAPED = re.compile(r"\\([0-7]{3})")


@dataclass(frozen=True, slots=True)
class CgroupMount:
    """A mounted cgroup hierarchy, or a part of one.

    Attributes:
        point: where it is mounted.
        root: path in the hierarchy of what is mounted.
        controllers: of version 1, as mount options; None for version 2.
    """

    point: Path
    root: str
    controllers: frozenset[str] | None

    def directories(self, path: str) -> list[Path]:
        """Return the directories of the cgroup at `path` and of all above it that can be seen here, lowest first.

        A path outside of what is mounted, as that of a container whose host path alone is known, leaves the top.
        """
        root = self.root.rstrip("/")
        inside = path.removeprefix(root) if f"{path}/".startswith(f"{root}/") else ""
        parts = [part for part in inside.split("/") if part not in ("", "..")]
        return [self.point.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]


def cgroup_mounts(mountinfo: str) -> tuple[CgroupMount, ...]:
    """Return the cgroup file systems in a text of ``/proc/PID/mountinfo``."""
    mounts = []
    for line in lines(mountinfo):
        # 35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:1 - cgroup cgroup rw,memory
        before, separator, after = line.partition(" - ")
        fields, (kind, *rest) = before.split(" "), after.split(" ") if separator else [""]
        if kind not in ("cgroup", "cgroup2") or len(fields) < 5:
            continue
        root, point = (_ESCAPED.sub(lambda match: chr(int(match[1], 8)), field) for field in fields[3:5])
        controllers = None if kind == "cgroup2" else frozenset(rest[-1].split(","))
        mounts.append(CgroupMount(Path(point), root, controllers))
    return tuple(mounts)


def cgroup_directories(mounts: Sequence[CgroupMount], membership: str, controller: str) -> Iterator[Path]:
    """Return the directories of the cgroup that `controller` sees a process in, and of all above it, lowest first.

    Args:
        mounts: what is mounted here.
        membership: text of the process's ``/proc/PID/cgroup``.
    """
    for line in lines(membership):
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        fitting = [
            mount
            for mount in mounts
            if (mount.controllers is None if number == "0" else controller in (mount.controllers or ()))
        ]
        # Mounted more than once: the mount that shows most levels.
        levels = [mount.directories(path) for mount in fitting]
        yield from max(levels, key=len, default=[])


def is_frozen(mounts: Sequence[CgroupMount], membership: str) -> bool:
    """Return whether the cgroup of a process, or one above it, is frozen (cgroup-v2.rst, freezer-subsystem.rst).

    Args:
        mounts, membership: as for :func:`cgroup_directories`.
    """
    for directory in cgroup_directories(mounts, membership, "freezer"):
        for file, word in (("cgroup.freeze", "1"), ("freezer.state", "FROZEN"), ("freezer.state", "FREEZING")):
            with contextlib.suppress(OSError):
                if (directory / file).read_text().strip() == word:
                    return True
    return False
