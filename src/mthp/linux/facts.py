"""Read the facts of /proc by which a process can be named, and the names of Kubernetes pods.

Pods are found without a request to a server. The kubelet keeps a link for each container in /var/log/containers, called
``<pod>_<namespace>_<container>-<ID>.log``, and the path of the container's control group contains the ID too. The link
leads to ``/var/log/pods/<namespace>_<pod>_<UID>/...``. The paths of all containers of a pod contain its UID, also the
path of the container that holds its namespaces, which has no log.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from mthp.linux import abi
from mthp.linux.cgroups import Namespace
from mthp.linux.process import ProcStat, list_pids, status_fields
from mthp.naming import ProcessFacts, comm_of, container_of

PROC = "/proc"
"""Mount point of proc."""

LOGS = (Path("/var/log/containers"), Path("/proc/1/root/var/log/containers"))
"""Directories of the links; in a container with the host's PID namespace below the root of the first process."""

_IN_CGROUP = frozenset(("cgroup", "unit", "pod", "container"))
"""Properties that come from the path of a control group."""

_LINK = re.compile(r"(?P<pod>[^_/]+)_(?P<namespace>[^_/]+)_(?P<container>.+)-(?P<id>[0-9a-f]{64})\.log")
_LOG = re.compile(r"/(?P<namespace>[^_/]+)_(?P<pod>[^_/]+)_(?P<uid>[0-9a-f][0-9a-f-]*)/")
_POD_UID = re.compile(r"pod([0-9a-f]{8}[0-9a-f_-]{24,28})(?![0-9a-f])")
"""A pod's UID in the path of a control group; systemd uses underscores in it, because a dash separates slices."""


class Pods:
    """The Kubernetes pods of this machine, from the links to their logs.

    Args:
        directories: possible directories of the links; the first existing one is used.
    """

    def __init__(self, directories: Iterable[Path] = LOGS) -> None:
        self._directories = tuple(directories)
        self._read_at: tuple[int, int] | None = None
        self._by_container: dict[str, tuple[str, str]] = {}
        self._by_uid: dict[str, str] = {}

    def of(self, cgroup: str) -> tuple[str, str]:
        """Return ``namespace/name`` of a control group's pod, and its container's name; ``""`` for an unknown one."""
        self._renew()
        known = self._by_container.get(container_of(cgroup))
        if known is not None:
            return known
        # A container without a log, such as the one that holds the pod's namespaces: its path has the pod's UID too.
        uid = _POD_UID.search(cgroup)
        return (self._by_uid.get(uid[1].replace("_", "-"), "") if uid else "", "")

    def _renew(self) -> None:
        """Read the links again if any was added or removed."""
        for directory in self._directories:
            try:
                state = directory.stat()
                # A link that comes or goes changes the directory's time, a directory that was made again its inode.
                if self._read_at == (state.st_ino, state.st_mtime_ns):
                    return
                names = os.listdir(directory)  # noqa: PTH208  (the names are wanted)
            except OSError:
                continue
            self._by_container, self._by_uid = {}, {}
            for name in names:
                self._take(directory, name)
            self._read_at = (state.st_ino, state.st_mtime_ns)
            return

    def _take(self, directory: Path, name: str) -> None:
        link = _LINK.fullmatch(name)
        if link is None:
            return
        pod = f"{link['namespace']}/{link['pod']}"
        self._by_container[link["id"]] = (pod, link["container"])
        try:
            log = _LOG.search(str((directory / name).readlink()))
        except OSError:
            return
        if log is not None:
            self._by_uid[log["uid"]] = pod


class FactsReader:
    """A reader of the facts by which processes can be named.

    Args:
        proc, logs: mount point of proc, and directories of the links of containers; for tests.
    """

    def __init__(self, proc: str | None = None, logs: Iterable[Path] = LOGS) -> None:
        self._proc = proc or PROC
        self._namespace: Namespace | None = None
        self._pods = Pods(logs)

    @property
    def namespace(self) -> Namespace:
        """Return the cgroup namespace, read when a control group is first needed."""
        if self._namespace is None:
            self._namespace = Namespace(self._proc)
        return self._namespace

    def hidden(self, properties: Iterable[str]) -> str:
        """Return why some of `properties` may match no process here, as a sentence; ``""`` if nothing hides them."""
        return self.namespace.hidden if _IN_CGROUP & set(properties) else ""

    def pids(self) -> list[int]:
        """Return the PIDs of all processes at this moment, ascending."""
        return sorted(list_pids(self._proc))

    def read(self, pid: int, properties: Iterable[str]) -> ProcessFacts | None:
        """Return the facts of a process; None if it is gone, a zombie or a kernel thread.

        Args:
            properties: the facts to read apart from the name.
        """
        directory, wanted = f"{self._proc}/{pid}", frozenset(properties)
        try:
            with open(f"{directory}/stat", "rb") as file:
                text = file.read()
            stat = ProcStat.parse(text)
            # Neither has memory. Other files of a zombie read as empty.
            if stat.flags & abi.PF_KTHREAD or stat.state in "ZX":
                return None
            comm = comm_of(text[text.index(b"(") + 1 : text.rindex(b")")])
            cgroup = self._cgroup(directory) if wanted & _IN_CGROUP else ""
            pod, container = self._pods.of(cgroup) if wanted & {"pod", "container"} else ("", "")
            return ProcessFacts(
                pid,
                stat.starttime,
                uid=_uid(directory) if "uid" in wanted else -1,
                comm=comm,
                exe=_exe(directory) if "exe" in wanted else "",
                cgroup=cgroup,
                pod=pod,
                container_name=container,
            )
        except (OSError, ValueError, IndexError):
            return None

    def _cgroup(self, directory: str) -> str:
        with open(f"{directory}/cgroup", errors="replace", newline="\n") as file:
            return self.namespace.path_of(file.read())


def _uid(directory: str) -> int:
    return int(status_fields(Path(f"{directory}/status").read_bytes()).get("Uid", "-1").split()[0])


def _exe(directory: str) -> str:
    try:
        return os.readlink(f"{directory}/exe").removesuffix(" (deleted)")  # noqa: PTH115
    except OSError:
        return ""
