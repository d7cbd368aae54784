"""Find other processes that share the address space or the table of open files of a target.

All processes are compared before the stop; after it only the new ones.
"""

from __future__ import annotations

from pathlib import Path

from mthp.linux.abi import KCMP_FILES, KCMP_VM, kcmp
from mthp.linux.process import Process, list_pids
from mthp.movechecks import Refusal

MAX_NEW_PROCESSES = 512
"""New PIDs that are compared one by one at most."""


def refuse_sharer(process: Process) -> Refusal | None:
    """Return a refusal if another process shares the address space or the table of open files of `process`.

    The other process would go on running while `process` is stopped.
    """
    pid = process.pid
    unknown = []
    for other in list_pids():
        if other == pid:
            continue
        answer = kcmp(pid, other, KCMP_VM)
        if answer == 0:
            return Refusal("shared_vm", f"process {other} runs in the same address space (CLONE_VM)")
        if kcmp(pid, other, KCMP_FILES) == 0:
            # It would run during a window, and could pass on the userfaultfd.
            return Refusal("shared_files", f"process {other} shares its table of open files (CLONE_FILES)")
        if answer is None:
            unknown.append(other)
    if not unknown:
        return None
    # Processes in one address space have one size. Every user may read it, and kernel threads have none.
    size = vm_size(pid)
    for other in unknown:
        if size == vm_size(other):
            return Refusal(
                "shared_vm_unknown",
                f"process {other} has exactly its size, and may run in the same address space (CLONE_VM)",
                "run as root, which may check this (kcmp)",
            )
    return None


def vm_size(pid: int) -> tuple[bytes, ...]:
    """Return size, text and data in pages (proc_pid_statm(5))."""
    try:
        words = Path(f"/proc/{pid}/statm").read_bytes().split()
    except OSError:
        return ()
    return (words[0], words[3], words[5])


def last_pid() -> int:
    """Return the PID that was last given out in this PID namespace (loadavg in proc.rst)."""
    return int(Path("/proc/loadavg").read_bytes().split()[-1])


def new_sharer(pid: int, last_then: int, last_now: int) -> bool:
    """Return whether a process newer than `last_then` shares the address space or the table of files of `pid`.

    A process that shares only the files would run during a window, and could pass on the userfaultfd.
    """
    if last_now == last_then:
        return False
    if not 0 < last_now - last_then <= MAX_NEW_PROCESSES:
        # The numbers wrapped, or are too many to compare one by one.
        return any(_may_share(pid, other) for other in list_pids())
    return any(_may_share(pid, other) for other in range(last_then + 1, last_now + 1))


def _may_share(pid: int, other: int) -> bool:
    answer = kcmp(pid, other, KCMP_VM)
    if answer is None:
        return vm_size(pid) == vm_size(other)
    if answer and kcmp(pid, other, KCMP_FILES):
        return False
    try:
        # Threads of the target have PIDs of the same sequence.
        return f"\nTgid:\t{pid}\n" not in Path(f"/proc/{other}/status").read_text()
    except OSError:
        return False
