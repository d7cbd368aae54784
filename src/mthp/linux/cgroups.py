"""Find the control groups of a process and their directories: of version 1, version 2, or both side by side.

``/proc/PID/cgroup`` has the path of a process in each hierarchy, and ``/proc/self/mountinfo`` the mounted part of each
hierarchy and its mount point (cgroups(7), proc_pid_mountinfo(5)). Users write paths in the whole hierarchy, so
:class:`Namespace` makes the paths absolute.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mthp.linux import abi
from mthp.linux.kernelfiles import unescaped
from mthp.text import lines


@dataclass(frozen=True, slots=True)
class CgroupMount:
    """A mounted cgroup hierarchy, or a part of one.

    Attributes:
        root: path of the mounted part in the hierarchy.
        controllers: mount options of version 1; None for version 2.
    """

    point: Path
    root: str
    controllers: frozenset[str] | None

    def directories(self, path: str) -> list[Path]:
        """Return the directories of the cgroup at `path` and of all above it that are visible here, lowest first.

        For a path outside of the mounted part, such as a container's path on the host, only the top is returned.
        """
        root = self.root.rstrip("/")
        # Both are relative to the cgroup namespace of the reader (cgroup_show_path() and proc_cgroup_show(),
        # kernel/cgroup/cgroup.c), so they fit together in a container, too.
        inside = path.removeprefix(root) if f"{path}/".startswith(f"{root}/") else ""
        parts = [part for part in inside.split("/") if part]
        if ".." in parts:
            # The path is outside of the mounted namespace: below the top another cgroup may have these names.
            parts = []
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
        root, point = map(unescaped, fields[3:5])
        controllers = None if kind == "cgroup2" else frozenset(rest[-1].split(","))
        mounts.append(CgroupMount(Path(point), root, controllers))
    return tuple(mounts)


def cgroup_directories(mounts: Sequence[CgroupMount], membership: str, controller: str) -> Iterator[Path]:
    """Return the directories of a process's cgroup for `controller`, and of all above it, lowest first.

    Args:
        membership: text of the process's ``/proc/PID/cgroup``.
    """
    for line in lines(membership):
        number, controllers, path = line.split(":", 2)
        # Version 2 has the number 0 and names no controllers (cgroups(7)).
        if number != "0" and controller not in controllers.split(","):
            continue
        fitting = [
            mount
            for mount in mounts
            if (mount.controllers is None if number == "0" else controller in (mount.controllers or ()))
        ]
        # If mounted more than once, use the mount that shows most levels.
        levels = [mount.directories(path) for mount in fitting]
        yield from max(levels, key=len, default=[])


def is_frozen(mounts: Sequence[CgroupMount], membership: str) -> bool:
    """Return whether the cgroup of a process, or one above it, is frozen (cgroup-v2.rst, freezer-subsystem.rst)."""
    for directory in cgroup_directories(mounts, membership, "freezer"):
        # A group freezes all groups below it, and their own cgroup.freeze does not show that.
        for file, word in (("cgroup.freeze", "1"), ("freezer.state", "FROZEN"), ("freezer.state", "FREEZING")):
            with contextlib.suppress(OSError):
                if (directory / file).read_text().strip() == word:
                    return True
    return False


class Namespace:
    """The cgroup namespace of this process; makes the kernel's paths in it absolute.

    In a namespace of its own (a container's), a process outside of it has a path such as ``/../../redis.service``, and
    one inside a path that begins at the container. The root of the namespace is visible only to a thread that briefly
    enters the first namespace, by way of a process in it. That takes the host's PID namespace and CAP_SYS_ADMIN.

    Args:
        proc: mount point of proc, for tests.

    Attributes:
        hidden: why paths are not absolute, as a sentence; ``""`` if they are.
    """

    def __init__(self, proc: str = "/proc") -> None:
        self._proc = proc
        self.hidden = ""
        self._roots: dict[str, str] = {}
        if _namespace_number(proc, "self") not in (abi.CGROUP_INIT_INO, None):
            self._find_roots()

    def _find_roots(self) -> None:
        # setns(2) moves only the calling thread: one that ends there has nothing to undo.
        thread = threading.Thread(target=self._look_from_outside)
        thread.start()
        thread.join()
        if not self._roots:
            self.hidden = (
                "this cgroup namespace hides the groups above it: paths of control groups begin at its root here"
                " (run it in the host's PID and cgroup namespaces: hostPID: true, or --pid=host --cgroupns=host)"
            )

    def _look_from_outside(self) -> None:
        """Record the root of each hierarchy. Runs in a thread of its own, which ends in the other namespace."""
        with contextlib.suppress(OSError):
            here = _memberships(_read(f"{self._proc}/thread-self/cgroup"))
            if not self._enter_first():
                return
            for key, absolute in _memberships(_read(f"{self._proc}/thread-self/cgroup")).items():
                inside = here.get(key, "").rstrip("/")
                # This thread's own path, from inside and from outside: what precedes the common end is the root.
                if absolute.endswith(inside) and not inside.startswith("/.."):
                    self._roots[key] = absolute.removesuffix(inside) or "/"

    def _enter_first(self) -> bool:
        """Have this thread enter the first cgroup namespace, if a process with visible namespaces is in it."""
        for process in filter(str.isdecimal, os.listdir(self._proc)):  # noqa: PTH208  (the names are wanted)
            if _namespace_number(self._proc, process) != abi.CGROUP_INIT_INO:
                continue
            with contextlib.suppress(OSError), open(f"{self._proc}/{process}/ns/cgroup", "rb") as file:
                # By now the PID may belong to another process, in another namespace.
                if os.fstat(file.fileno()).st_ino == abi.CGROUP_INIT_INO:
                    return not abi.enter_namespace(file.fileno(), abi.CLONE_NEWCGROUP)
        return False

    def path_of(self, membership: str) -> str:
        """Return the absolute path of a process's control group; ``""`` if it is in none.

        It is the path in the version 2 hierarchy. If that is the top, or there is none, it is the path in systemd's
        hierarchy of version 1, else the first non-empty one of the others.

        Args:
            membership: text of the process's ``/proc/PID/cgroup``.
        """
        paths = _memberships(membership)
        ranked = sorted(paths, key=lambda key: (key != "", key != "name=systemd"))
        absolute = [posixpath.normpath(self._roots.get(key, "/") + paths[key]).replace("//", "/") for key in ranked]
        return next((path for path in absolute if path != "/"), absolute[0] if absolute else "")


def _namespace_number(proc: str, process: str) -> int | None:
    """Return the inode of the cgroup namespace of a process; None if it is not visible, as before Linux 4.6."""
    try:
        return os.stat(f"{proc}/{process}/ns/cgroup").st_ino  # noqa: PTH116  (joins no path)
    except OSError:
        return None


def _memberships(text: str) -> dict[str, str]:
    """Return the paths in a text of ``/proc/PID/cgroup`` by hierarchy: ``""`` for version 2, else its controllers."""
    fields = (line.split(":", 2) for line in lines(text))
    return {each[1]: each[2].removesuffix(" (deleted)") for each in fields if len(each) == 3}


def _read(path: str) -> str:
    with open(path, errors="replace", newline="\n") as file:
        return file.read()
