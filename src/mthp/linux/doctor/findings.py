"""What `mthp doctor` finds, and what it asks to find it."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, NamedTuple

from mthp.geometry import Geometry
from mthp.linux.probes import Probed
from mthp.linux.rights import Rights
from mthp.linux.sysfs import ThpSysfs

PTRACE_SCOPE = "sys/kernel/yama/ptrace_scope"


class State(StrEnum):
    """How it stands with a finding."""

    OK = "ok"
    LIMITED = "limited"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question.

    Attributes:
        key: a word for scripts, which stays.
        title: what it is about.
        state: how it stands.
        what: what is the case.
        remedy: what would make it better: a capability, a setting, a kernel, a package; or ``""``.
    """

    key: str
    title: str
    state: State
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Examination:
    """What was found out about a machine and the rights of this process.

    Attributes:
        kernel: its release.
        geometry: of the machine.
        has_thp: whether this kernel has THP at all.
        findings: in the order of a person's interest.
    """

    JSON: ClassVar = "kernel geometry findings"

    kernel: str
    geometry: Geometry
    has_thp: bool
    findings: tuple[Finding, ...]


class Answer(NamedTuple):
    """The answer to a question, as in :class:`Finding`."""

    state: State
    what: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the questions are asked of.

    Attributes:
        thp: the THP directory.
        proc: where proc is mounted.
        geometry: of the machine.
        probed: outcome of the trials.
        rights: of this process.
    """

    thp: ThpSysfs
    proc: Path
    geometry: Geometry
    probed: Probed
    rights: Rights

    @property
    def pmd(self) -> str:
        """The PMD size, as people write it."""
        return self.geometry.label(self.geometry.pmd_order)

    def text(self, path: str) -> str | None:
        """The text of a file of proc; None if it cannot be read."""
        try:
            return (self.proc / path).read_text(errors="replace").strip()
        except OSError:
            return None

    @property
    def switched_off(self) -> bool:
        """Whether this process, or one that it descends from, switched THP off (THP_enabled, proc_pid_status(5))."""
        return "THP_enabled:\t0" in (self.text("self/status") or "")

    def size_list(self, orders: tuple[int, ...]) -> str:
        """Sizes as people write them."""
        return ", ".join(self.geometry.label(order) for order in orders) or "none"


def name_of(error: int) -> str:
    """The name of an errno, such as ``"EPERM"``."""
    return errno.errorcode.get(error, f"errno {error}")


def refused(call: str, error: int) -> str:
    """That `call` fails with `error`, for a person."""
    return f"{call} fails with {name_of(error)} ({os.strerror(error)})"
