"""Names of processes: one grammar and one matcher, for the command line and for the rules of the daemon.

A name is a kind, a colon and a shell pattern (fnmatch), in which ``*`` also stands for slashes:

=============================  =====================================================================================
``comm:redis-server``          the kernel's name of a process, at most 15 bytes
``exe:/usr/bin/qemu-*``        the path of its executable, or of a link to it
``unit:redis.service``         a systemd unit of the process; ``unit:redis`` means redis.service
``cgroup:/kubepods.slice/*``   its control group, or one above it
``pod:shop/redis-*``           its Kubernetes pod, as namespace/pod; ``pod:redis-*`` in any namespace
``container:3f2a``             its container, by the beginning of its ID, or by its name
``user:redis``                 its real user, by name or number
``all``                        every process with memory of its own, mthp itself left out
=============================  =====================================================================================

Units, pods and containers are part of the path of a control group: systemd and the container runtimes put them there.
"""

from __future__ import annotations

import itertools
import os
import pwd
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Annotated, Any

from mthp.errors import UsageError
from mthp.toml import text, whole

WILDCARDS = re.compile(r"[*?]|\[[^]]*\]")

COMM_BYTES = 15
"""Bytes of a name that the kernel keeps (TASK_COMM_LEN less the final zero, include/linux/sched.h)."""

HOW_TO_NAME = (
    "write a PID, self, a file, all, or comm:NAME, exe:PATH, unit:NAME, cgroup:/PATH, pod:NAMESPACE/NAME, container:ID"
    " or user:NAME; * stands for any text"
)

ALL = ("uid", "cgroup", "unit", "pod", "container", "comm", "exe", "pid")
"""Properties, the least specific first."""

_WEIGHTS = {name: 1 << at for at, name in enumerate(ALL)}
"""The weight of a property when rules are compared: each exceeds the sum of all before it."""

KINDS = ("comm", "exe", "unit", "cgroup", "pod", "container", "user")
"""Words before the colon: properties, and the word for a uid."""

_UNIT = re.compile(r"[^/]+\.(?:service|scope|socket|mount|swap)")
"""A systemd unit that has processes (systemd.unit(5)). Slices contain units, so they are left out."""

_CONTAINER = re.compile(r"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
"""An ID as docker, containerd, CRI-O and podman write it in the name of a control group."""


def pattern(value: Any) -> str:
    """Return a shell pattern that can fit something.

    Raises:
        UsageError: `value` is not a text, or empty.
    """
    if not text(value):
        raise UsageError("an empty pattern fits no process", help='use "*" for every process')
    return str(value)


def cgroup_pattern(value: Any) -> str:
    """Return a pattern of paths below the root of the version 2 hierarchy.

    Raises:
        UsageError: as :func:`pattern`, or `value` is a path of the file system.
    """
    given = pattern(value)
    if given.startswith("/sys/fs/cgroup/"):
        raise UsageError(
            f"{given[:60]!r} is a path of the file system",
            help="write the path below /sys/fs/cgroup, as in /proc/PID/cgroup",
        )
    given = given.rstrip("/") or "/"
    return given if given.startswith(("/", "*")) else f"/{given}"


def unit_pattern(value: Any) -> str:
    """Return a pattern of systemd units; a name without a suffix is a service, as for systemctl(1).

    Raises:
        UsageError: as :func:`pattern`.
    """
    given = pattern(value)
    return given if WILDCARDS.search(given) or _UNIT.fullmatch(given) else f"{given}.service"


def pod_pattern(value: Any) -> str:
    """Return a pattern of ``namespace/pod``; a pattern without a slash fits any namespace.

    Raises:
        UsageError: as :func:`pattern`.
    """
    given = pattern(value)
    return given if "/" in given else f"*/{given}"


def comm_pattern(value: Any) -> str:
    """Return a pattern of names; a literal name is cut as the kernel cuts it.

    Raises:
        UsageError: as :func:`pattern`.
    """
    given = pattern(value)
    # Arguments that are not UTF-8 hold surrogates, and the kernel may cut a character in two: comm_of() shows both so.
    raw = given.encode(errors="surrogateescape")
    return comm_of(raw if WILDCARDS.search(given) else raw[:COMM_BYTES])


def comm_of(raw: bytes) -> str:
    """Return the name of a process as a text, with U+FFFD for what is not UTF-8."""
    return raw.decode(errors="replace")


def user_id(value: Any) -> int:
    """Return the number of a user, given as a number, its digits, or a name.

    Raises:
        UsageError: no user has that name.
    """
    if not isinstance(value, str):
        return int(whole()(value))
    if value.isascii() and value.isdecimal():
        # Python does not convert numbers of thousands of digits. Without its leading zeros no user's has 20.
        return int(value.lstrip("0")[:20] or 0)
    try:
        return pwd.getpwnam(value).pw_uid
    except (KeyError, ValueError):
        raise UsageError(
            f"unknown user {value[:60]!r}", help="use a name that getent passwd(1) knows, or a number"
        ) from None


@dataclass(frozen=True)
class ProcessFacts:
    """The properties of a process that names are matched against.

    Attributes:
        pid: its PID.
        starttime: its start, in clock ticks since boot.
        uid: its real user.
        comm: its name in the kernel.
        exe: path of its executable; ``""`` if not readable.
        cgroup: absolute path of its control group; ``""`` if not visible.
        pod: ``namespace/name`` of its Kubernetes pod; ``""`` if none is known.
        container_name: Kubernetes's name of its container.
    """

    pid: int
    starttime: int
    uid: int = -1
    comm: str = ""
    exe: str = ""
    cgroup: str = ""
    pod: str = ""
    container_name: str = ""

    @cached_property
    def container(self) -> str:
        """The ID of its innermost container; ``""`` if it is in none."""
        return container_of(self.cgroup)

    @cached_property
    def units(self) -> tuple[str, ...]:
        """The systemd units that it is in, the outermost first: user@1000.service before a user's own service."""
        return tuple(part for part in self.cgroup.split("/") if _UNIT.fullmatch(part))

    @property
    def label(self) -> str:
        """Its name in messages: ``"1234 (comm)"``."""
        return f"{self.pid} ({self.comm})"

    @property
    def service(self) -> str:
        """The name of its pod, container or service, else its own, as it is written in a target."""
        service = next((unit for unit in reversed(self.units) if unit.endswith(".service")), "")
        if self.pod:
            return f"pod:{self.pod}"
        if self.container:
            return f"container:{self.container[:12]}"
        return f"unit:{service}" if service else f"comm:{self.comm}"


def container_of(cgroup: str) -> str:
    """Return the ID of the innermost container in the path of a control group; ``""`` if none."""
    found: list[str] = _CONTAINER.findall(cgroup)
    return found[-1] if found else ""


Patterns = tuple[Annotated[str, pattern], ...]


@dataclass(frozen=True, slots=True)
class Match:
    """The properties that a rule or a target names, the keys of a rule's ``match``; empty tuples fit everything.

    Attributes:
        pid, uid: any of these numbers.
        comm, exe, unit, cgroup, pod, container: any of these patterns.
    """

    pid: tuple[Annotated[int, whole(1)], ...] = ()
    uid: tuple[Annotated[int, user_id], ...] = ()
    comm: tuple[Annotated[str, comm_pattern], ...] = ()
    exe: Patterns = ()
    unit: tuple[Annotated[str, unit_pattern], ...] = ()
    cgroup: tuple[Annotated[str, cgroup_pattern], ...] = ()
    pod: tuple[Annotated[str, pod_pattern], ...] = ()
    container: Patterns = ()

    def fits(self, facts: ProcessFacts) -> bool:
        """Return whether a process has all the named properties."""
        return (
            (not self.pid or facts.pid in self.pid)
            and (not self.uid or facts.uid in self.uid)
            and _any_fits(self.comm, (facts.comm,))
            and _exe_fits(facts.exe, self.exe)
            and _any_fits(self.unit, facts.units)
            and _any_fits(self.cgroup, _with_parents(facts.cgroup))
            and _any_fits(self.pod, (facts.pod,) if facts.pod else ())
            and (not self.container or _container_fits(facts, self.container))
        )

    @property
    def named(self) -> tuple[str, ...]:
        """The properties that are named."""
        return tuple(name for name in _WEIGHTS if getattr(self, name))

    @property
    def specificity(self) -> tuple[int, int]:
        """A number that is larger for a more specific match, as a tuple."""
        texts = itertools.chain(*(getattr(self, name) for name in self.named if name not in ("pid", "uid")))
        # Of several patterns the shortest decides, because each of them alone fits.
        literal = min((len(WILDCARDS.sub("", each)) for each in texts), default=0)
        return sum(_WEIGHTS[name] for name in self.named), literal

    def may_share_a_process(self, other: Match) -> bool:
        """Return whether some process could fit both, as far as the texts tell."""
        for name in self.named:
            ours, theirs = getattr(self, name), getattr(other, name)
            if theirs and not any(_overlap(one, another) for one in ours for another in theirs):
                return False
        return True


def match_of(word: str) -> Match | None:
    """Return the match that a name means; None if `word` is not a known kind, a colon, and a pattern.

    Raises:
        UsageError: the pattern is not valid, or the user does not exist.
    """
    if word == "all":
        return Match()
    kind, colon, given = word.partition(":")
    if not colon or kind not in KINDS:
        return None
    if kind == "user":
        return Match(uid=(user_id(given),))
    readers = {"comm": comm_pattern, "unit": unit_pattern, "cgroup": cgroup_pattern, "pod": pod_pattern}
    fields: dict[str, Any] = {kind: (readers.get(kind, pattern)(given),)}
    return Match(**fields)


def _any_fits(patterns: tuple[str, ...], texts: Iterable[str]) -> bool:
    return not patterns or any(fnmatchcase(each, pattern) for each in texts for pattern in patterns)


def _exe_fits(exe: str, patterns: tuple[str, ...]) -> bool:
    """Return whether the path of an executable fits one of the patterns, or one is a link to it.

    The kernel knows the file alone: Debian's /usr/bin/java and /usr/bin/redis-server are links.
    """
    links = (each for each in patterns if each.startswith("/") and not WILDCARDS.search(each))
    return _any_fits(patterns, (exe,)) or any(os.path.realpath(each) == exe for each in links)


def _container_fits(facts: ProcessFacts, patterns: tuple[str, ...]) -> bool:
    """Return whether the ID of a container begins with, or its name fits, one of the patterns."""
    begins = (f"{pattern}*" for pattern in patterns)
    return bool(facts.container) and (
        any(fnmatchcase(facts.container, each) for each in begins) or _any_fits(patterns, (facts.container_name,))
    )


def _with_parents(path: str) -> Iterator[str]:
    while path and path != "/":
        yield path
        path = path.rpartition("/")[0]
    yield "/"


def _overlap(one: str | int, other: str | int) -> bool:
    """Return whether something may fit both patterns. If both have wildcards, their fixed ends decide."""
    if isinstance(one, int) or isinstance(other, int):
        return one == other
    if fnmatchcase(one, other) or fnmatchcase(other, one):
        return True
    (one_start, one_end), (other_start, other_end) = _fixed_ends(one), _fixed_ends(other)
    if not WILDCARDS.search(one) or not WILDCARDS.search(other):
        return False
    starts = one_start.startswith(other_start) or other_start.startswith(one_start)
    return starts and (one_end.endswith(other_end) or other_end.endswith(one_end))


def _fixed_ends(pattern: str) -> tuple[str, str]:
    pieces = WILDCARDS.split(pattern)
    return pieces[0], pieces[-1]
