"""Which control groups a process is in, and where they are: of version 1, version 2, or both side by side.

``/proc/PID/cgroup`` has the path of a process in each hierarchy, and ``/proc/self/mountinfo`` what part of a hierarchy
is mounted where (cgroups(7), proc_pid_mountinfo(5)). Both are relative to the cgroup namespace of the process that
reads them (cgroup_show_path() and proc_cgroup_show(), kernel/cgroup/cgroup.c), so they fit together in a container too.
What a person writes is a path in the whole hierarchy, so :class:`Namespace` makes the paths absolute.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mthp.linux import abi
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
        parts = [part for part in inside.split("/") if part]
        if ".." in parts:
            # Outside of the cgroup namespace that is mounted: below the top something else may have these names.
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


class Namespace:
    """The cgroup namespace of this process, and the paths that the kernel tells in it, made absolute.

    In a namespace of its own (a container's), a process outside of it has a path such as ``/../../redis.service``, and
    one inside a path that begins at the container. The root of the namespace shows once: to a thread that enters the
    first namespace for a moment, by way of a process that is in it. That takes the host's PID namespace and
    CAP_SYS_ADMIN.

    Args:
        proc: where /proc is, for tests.

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
        thread = threading.Thread(target=self._look_from_outside)
        thread.start()
        thread.join()
        if not self._roots:
            self.hidden = (
                "this cgroup namespace hides what lies above it: paths of control groups begin at its root here"
                " (run it in the host's PID and cgroup namespaces: hostPID: true, or --pid=host --cgroupns=host)"
            )

    def _look_from_outside(self) -> None:
        """Note the root of each hierarchy. Runs in a thread of its own, which ends in the other namespace."""
        with contextlib.suppress(OSError):
            here = _memberships(_read(f"{self._proc}/thread-self/cgroup"))
            if not self._enter_first():
                return
            for key, absolute in _memberships(_read(f"{self._proc}/thread-self/cgroup")).items():
                inside = here.get(key, "").rstrip("/")
                if absolute.endswith(inside) and not inside.startswith("/.."):
                    self._roots[key] = absolute.removesuffix(inside) or "/"

    def _enter_first(self) -> bool:
        """Have this thread enter the first cgroup namespace, if a process is in it whose namespaces are visible."""
        for process in filter(str.isdecimal, os.listdir(self._proc)):  # noqa: PTH208  (the names are wanted)
            if _namespace_number(self._proc, process) != abi.CGROUP_INIT_INO:
                continue
            with contextlib.suppress(OSError), open(f"{self._proc}/{process}/ns/cgroup", "rb") as file:
                # The PID may be that of another process by now, in another namespace.
                if os.fstat(file.fileno()).st_ino == abi.CGROUP_INIT_INO:
                    return not abi.enter_namespace(file.fileno(), abi.CLONE_NEWCGROUP)
        return False

    def path_of(self, membership: str) -> str:
        """Return the absolute path of a process's control group; ``""`` if it is in none.

        That is its path in the version 2 hierarchy. Where it is at the top of that, or where there is none, its path in
        systemd's hierarchy of version 1, else the first of another one that says anything.

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
