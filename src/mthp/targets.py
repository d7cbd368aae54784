"""What a person may name as a target, and the address space behind it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mthp.addrspace import AddressSpace
from mthp.errors import TargetVanishedError, UsageError

Target = int | str | os.PathLike[str]
"""A PID, ``"self"``, or the path of a snapshot or recording; a PID may be written as text."""

PID_MAX = 1 << 22
"""No process has a larger PID (PID_MAX_LIMIT, include/linux/threads.h)."""


def open_target(target: Target, *, at: str | None = None) -> AddressSpace:
    """Open the address space that `target` names. The caller closes it (it is a context manager).

    Args:
        at: which step of a recording; see :meth:`mthp.snapshot.recording.Recording.step_at`. The last by default.

    Raises:
        UsageError: neither a PID nor ``self`` nor a file that is there; a file that is neither snapshot nor recording;
            a step that there is not.
        TargetVanishedError: there is no such process.
        NotPermittedError: its memory is not ours to look at.
        UnsupportedError: it has no memory to look at; or what reads snapshots is not installed.
    """
    if (pid := pid_of(target)) is not None:
        # The backends are imported where they are chosen: neither is small, and a command needs one of them.
        from mthp.linux.live import open_live

        if at is not None:
            raise UsageError(f"a process has no step {at!r}", help="steps are those of a recording: mthp record")
        return open_live("self" if pid == os.getpid() else pid)
    path = Path(target)  # type: ignore[arg-type]
    if not os.path.lexists(path):
        raise UsageError(
            f"target {str(target)!r} is neither a PID nor 'self' nor a file that exists",
            help="give the PID of a process, the word self, or the path of what `mthp snapshot` or `record` wrote",
        )
    from mthp.snapshot import open_file

    return open_file(path, at=at)


def pid_of(target: Target) -> int | None:
    """The PID that `target` is, or None if it is a file.

    Raises:
        TargetVanishedError: a number that no process can have.
    """
    if target == "self":
        return os.getpid()
    if isinstance(target, str):
        if not re.fullmatch(r"-?[0-9]+", target):
            return None
        # Python converts no numbers of thousands of digits; these are as far from a PID as they were.
        target = int(target[:20])
    if not isinstance(target, int):
        return None
    if not 0 < target <= PID_MAX:
        raise TargetVanishedError(f"no process {target}: PIDs are 1 to {PID_MAX}")
    return target


def refuse_ancestor(target: Target) -> None:
    """Refuse to change a process on which this one depends: its shell, its terminal, its service manager.

    Raises:
        UsageError: `target` is an ancestor of this process.
    """
    pid = pid_of(target)
    parent = os.getppid()
    while parent > 0:
        if parent == pid:
            raise UsageError(
                f"process {pid} is an ancestor of this mthp (its shell, terminal or service manager)",
                help="start mthp from elsewhere, for example from another terminal, to collapse this process",
            )
        parent = _parent_of(parent)


def _parent_of(pid: int) -> int:
    """The parent's PID; 0 for the first process and for one that is gone or hidden."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return 0
    # The name in parentheses may hold anything; what follows it does not: state, then the parent (proc_pid_stat(5)).
    return int(stat.rpartition(")")[2].split()[1])
