"""The findings of `mthp doctor`, and the facts from which they are derived."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar, NamedTuple

from mthp.geometry import Geometry
from mthp.linux.kernelfiles import text_of
from mthp.linux.probes import Probed
from mthp.linux.rights import Rights
from mthp.linux.sysfs import ThpSysfs

PTRACE_SCOPE = "sys/kernel/yama/ptrace_scope"


class State(StrEnum):
    """The state of a finding."""

    OK = "ok"
    LIMITED = "limited"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class Finding:
    """The answer to one question.

    Attributes:
        key: a stable word for scripts.
        remedy: a way to improve it: a capability, a setting, a kernel, a package; or ``""``.
    """

    key: str
    title: str
    state: State
    what: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Examination:
    """The abilities of a machine and the rights of this process.

    Attributes:
        kernel: its release.
        findings: in the order of their interest to users.
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
    """The facts from which questions are answered."""

    thp: ThpSysfs
    proc: Path
    geometry: Geometry
    probed: Probed
    rights: Rights

    @property
    def pmd(self) -> str:
        """Return the PMD size, as users write it."""
        return self.geometry.label(self.geometry.pmd_order)

    def text(self, path: str) -> str | None:
        """Return the text of a file of proc; None if it cannot be read."""
        return text_of(self.proc / path)

    @property
    def switched_off(self) -> bool:
        """Return whether this process, or an ancestor of it, switched THP off (THP_enabled, proc_pid_status(5))."""
        return "THP_enabled:\t0" in (self.text("self/status") or "")

    def size_list(self, orders: tuple[int, ...]) -> str:
        """Return sizes as users write them."""
        return ", ".join(self.geometry.label(order) for order in orders) or "none"


Question = tuple[str, str, bool, Callable[[Facts], Answer]]
"""Key, title, whether it is about a part of THP, and the function that answers."""


def name_of(error: int) -> str:
    """Return the name of an errno, such as ``"EPERM"``."""
    return errno.errorcode.get(error, f"errno {error}")


def refused(call: str, error: int) -> str:
    """Return a sentence for users: `call` fails with `error`."""
    return f"{call} fails with {name_of(error)} ({os.strerror(error)})"
