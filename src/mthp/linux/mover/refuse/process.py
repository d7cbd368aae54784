"""Check which processes the mover refuses; :mod:`~mthp.linux.mover.refuse` explains why it refuses any.

Every check queries the kernel at that moment: nothing follows from names of programs or from versions. Facts that can
change afterwards are checked again once the threads are stopped; being traced by this program is then not a refusal.
No check stops or changes anything.
"""

from __future__ import annotations

import errno
import os
import re
import struct
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

from mthp.budget import Room, as_amount
from mthp.errors import MthpError, NotPermittedError, UnsupportedError
from mthp.geometry import Geometry
from mthp.linux.abi import KCMP_FILES, kcmp
from mthp.linux.cgroups import cgroup_mounts, is_frozen
from mthp.linux.memorylimits import memory_bounds
from mthp.linux.mover.arch import native
from mthp.linux.mover.padding import find_padding
from mthp.linux.mover.refuse.devices import open_files, refuse_files
from mthp.linux.mover.refuse.sharing import refuse_sharer
from mthp.linux.mover.targetmemory import ProcessMemory
from mthp.linux.mover.taskfiles import Thread, read_task_file, read_threads
from mthp.linux.probes import UFFD_FEATURE_MOVE, probe_userfaultfd
from mthp.linux.process import Process, ancestors
from mthp.means import USUAL_MEANS, Means, most_threads, price_of_moving
from mthp.movechecks import Refusal
from mthp.units import format_size

ELFCLASS64 = 2
ELF_MACHINES = {"x86_64": 62, "aarch64": 183}
"""``EM_X86_64`` and ``EM_AARCH64`` of include/uapi/linux/elf-em.h, by name in ``uname -m``."""

PER_MASK = 0xFF
READ_IMPLIES_EXEC = 0x0400000
"""include/uapi/linux/personality.h."""

CLONING_CALLS = {"x86_64": (56, 58, 435), "aarch64": (220, 435)}
"""``clone``, ``vfork`` and ``clone3`` in ``asm/unistd.h``: the calls that wait for a child to exec."""

UNINTERRUPTIBLE_LOOKS = 5
UNINTERRUPTIBLE_PAUSE = 0.002
"""Number of checks and seconds between them: a thread in state D each time is expected to stay so. Most leave it after
a disk access or a page fault."""

PASSING = frozenset({"vfork", "uninterruptible"})
"""Keys of refusals that may pass in a moment."""

_ELF_HEADER = struct.Struct("<4sB13xH")
_MAPPED_AIO = re.compile(rb" /\[aio\](?: \(deleted\))?$", re.MULTILINE)
_MAPPED_IO_URING = re.compile(rb" anon_inode:\[io_uring\]$", re.MULTILINE)


class _Target:
    """The data that the checks use; each item is read once, when a check first needs it."""

    def __init__(self, process: Process, geometry: Geometry, means: Means) -> None:
        self.process = process
        self.geometry = geometry
        self.means = means

    @cached_property
    def threads(self) -> list[Thread]:
        return read_threads(self.process)

    @cached_property
    def maps(self) -> bytes:
        return self.process.read("maps")

    @cached_property
    def files(self) -> list[tuple[str, int]]:
        """Return the targets of the file descriptors of all threads, as :func:`open_files` does."""
        own_tables = [
            thread.tid
            for thread in self.threads
            if thread.tid != self.process.pid and kcmp(self.process.pid, thread.tid, KCMP_FILES) not in (0, None)
        ]
        directories = ["fd", *(f"task/{tid}/fd" for tid in own_tables)]
        return [file for directory in directories for file in open_files(self.process, directory)]


def refuse_process(process: Process, geometry: Geometry, means: Means = USUAL_MEANS) -> list[Refusal]:
    """Return the refusals of `process` at this moment; empty if it may be moved."""
    target = _Target(process, geometry, means)
    refused = [*_process(target), *_threads(target), *_memory(target)]
    if refusal := _not_permitted(target):
        # The other checks read files that these rights do not open.
        return [*refused, refusal]
    try:
        # One by one, so that those before an error stay.
        for refusal in _program(target):
            refused.append(refusal)
        refused += refuse_files(target.files)
    except NotPermittedError as error:
        # Its owner has changed by execve(2) meanwhile.
        refused.append(Refusal("not_permitted", error.message, error.help))
    return refused


# --- Checks without special rights ------------------------------------------------------------------------------------


def _process(target: _Target) -> Iterator[Refusal]:
    """Refuse a process that must not be stopped, and a machine or kernel that cannot move pages."""
    if target.process.is_self:
        yield Refusal("itself", "it is this process, which cannot stop itself", "mthp.collapse_buffer moves own memory")
    if target.process.pid == 1:
        yield Refusal(
            "init", "it is process 1: the system would end with it if mthp were killed while it prepares the move"
        )
    if target.process.pid in ancestors():
        yield Refusal(
            "ancestor",
            "it started this process, which might wait for it while it is stopped",
            "run mthp from another session",
        )
    if (machine := os.uname().machine) not in ELF_MACHINES:
        yield Refusal("machine", f"the mover does not know {machine}", "it knows x86_64 and aarch64")
    # Tried by this process: the target's own rights show only when it creates one in the window.
    error, features = probe_userfaultfd()
    if error in (errno.EPERM, errno.EACCES):
        yield Refusal(
            "userfaultfd_forbidden",
            f"userfaultfd is forbidden: {os.strerror(error)}",
            "run outside the seccomp filter or security module that forbids it",
        )
    elif error != 0 or not features & UFFD_FEATURE_MOVE:
        remedy = "Linux 6.8 or later with CONFIG_USERFAULTFD"
        yield Refusal("no_uffdio_move", "this kernel cannot move pages (UFFDIO_MOVE)", remedy)


def _threads(target: _Target) -> Iterator[Refusal]:
    """Refuse threads that cannot be traced, that are too many, or that must not run injected code."""
    # After the stop the tracer is a thread of this program.
    ours = {0, *(int(path.name) for path in Path("/proc/self/task").iterdir())}
    if traced := [thread for thread in target.threads if thread.tracer not in ours]:
        yield Refusal(
            "traced",
            f"thread {traced[0].tid} is traced by process {traced[0].tracer}",
            "end that debugger, strace or other mthp first",
        )
    # Each takes time to stop, so that every window of thousands of threads would be long.
    threads, pause = int(target.process.status("Threads") or 1), target.means.max_pause_ns
    if threads > (most := target.means.max_threads or most_threads(pause)):
        yield Refusal(
            "threads",
            f"it has {threads} threads, more than {most}: moving {price_of_moving(threads, pause)}",
            f"accept that (--max-threads {threads}), or allow a longer --max-pause",
        )
    if filtered := [thread for thread in target.threads if thread.seccomp]:
        yield Refusal(
            "seccomp",
            f"a seccomp filter guards thread {filtered[0].tid}: a call that it does not know may kill the process",
            "run it without the filter (in a container --security-opt seccomp=unconfined)",
        )
    # io_uring names its threads iou-sqp-PID and iou-wrk-PID (io_uring/sqpoll.c, io_uring/io-wq.c).
    if workers := [thread for thread in target.threads if thread.comm.startswith("iou-")]:
        yield Refusal(
            "io_uring_threads",
            f"thread {workers[0].tid} ({workers[0].comm}) is the kernel's, which reads and writes its memory for it",
        )


def _memory(target: _Target) -> Iterator[Refusal]:
    """Refuse memory that is pinned, may not have large folios, is short, or whose threads cannot run."""
    pinned = (target.process.status("VmPin") or "0 kB").split()[0]
    if pinned != "0":
        yield Refusal("pinned", f"{format_size(int(pinned) << 10)} of it are pinned for devices or io_uring (VmPin)")
    # Shows only a complete PR_SET_THP_DISABLE (task_thp_status, fs/proc/array.c), not one that excepts advised memory.
    if target.process.status("THP_enabled") == "0":
        yield Refusal("thp_disabled", "the process switched THP off for itself (PR_SET_THP_DISABLE)")
    membership = target.process.read("cgroup").decode(errors="replace")
    # A move briefly takes a second set of pages, and the OOM killer might end the target.
    room = Room(lambda: memory_bounds(membership), as_amount(target.means.reserve))
    if refusal := low_memory(room, target.geometry):
        yield refusal
    # Frozen threads stop for a tracer, but run no code until they are thawed (do_freezer_trap).
    if is_frozen(cgroup_mounts(Path("/proc/self/mountinfo").read_text()), membership):
        yield Refusal("frozen", "its cgroup is frozen, so it cannot run the code that moves its pages", "thaw it first")


def low_memory(room: Room, geometry: Geometry) -> Refusal | None:
    """Return a refusal if there is too little room for the smallest move: one window with a page table of its own."""
    if room.take(2 * geometry.pmd_size):
        return None
    return Refusal("low_memory", room.reason, "free some memory, raise the limit, or lower the reserve (--reserve)")


# --- Checks with the right to trace -----------------------------------------------------------------------------------


def _not_permitted(target: _Target) -> Refusal | None:
    """Try to open ``mem``, which takes PTRACE_MODE_ATTACH and Yama (proc_mem_open, fs/proc/base.c), but no stop."""
    if target.process.is_self:
        return None
    try:
        os.close(target.process.open("mem"))
    except NotPermittedError:
        return Refusal(
            "not_permitted",
            f"process {target.process.label} may not be traced with these rights",
            "CAP_SYS_PTRACE (run as root), or the same user and kernel.yama.ptrace_scope=0",
        )
    return None


def _program(target: _Target) -> Iterator[Refusal]:
    """Refuse a program that the stub cannot run in, and holders of its memory that would not stop with it."""
    foreign = _bits(target)
    if foreign:
        yield foreign
    word = int(target.process.read("personality"), 16)
    # READ_IMPLIES_EXEC makes every readable mapping executable, and so the stub's data.
    if word & (PER_MASK | READ_IMPLIES_EXEC):
        yield Refusal(
            "personality",
            f"it runs with personality {word:#x}, in which system calls or mappings are not the usual ones",
            "start it without setarch(8) or an executable stack",
        )
    if refusal := _uninterruptible(target):
        yield refusal
    if refusal := refuse_sharer(target.process):
        yield refusal
    if _MAPPED_IO_URING.search(target.maps) or any(link == "anon_inode:[io_uring]" for link, _ in target.files):
        yield Refusal("io_uring", "it has an io_uring, which may read or write its memory at any time")
    if _MAPPED_AIO.search(target.maps):
        yield Refusal(
            "aio", "it has a context of asynchronous I/O (io_setup), which may write to its memory at any time"
        )
    if foreign is None and (refusal := _padding(target)):
        yield refusal


def _bits(target: _Target) -> Refusal | None:
    try:
        fd = target.process.open("exe")
    except MthpError:
        target.process.check_alive()
        return Refusal("executable", "its executable cannot be read, so its machine is unknown")
    try:
        return foreign_executable(os.pread(fd, _ELF_HEADER.size, 0), os.uname().machine)
    finally:
        os.close(fd)


def foreign_executable(header: bytes, machine: str) -> Refusal | None:
    """Return a refusal if an executable is of another word size or machine than the stub (elf(5)).

    Args:
        machine: name in ``uname -m``.
    """
    if len(header) < _ELF_HEADER.size:
        return Refusal("executable", "its executable is not an ELF file")
    magic, word_class, kind = _ELF_HEADER.unpack_from(header)
    if magic != b"\x7fELF":
        return Refusal("executable", "its executable is not an ELF file")
    if word_class != ELFCLASS64:
        return Refusal("not_64_bit", "it is not a 64-bit process", "a 64-bit build of the program")
    if kind != ELF_MACHINES.get(machine):
        return Refusal("executable", f"its executable is not made for {machine}")
    return None


def _uninterruptible(target: _Target) -> Refusal | None:
    stuck = [thread.tid for thread in target.threads if thread.state == "D"]
    # Most threads are in state D for a disk access or a page fault only.
    for look in range(UNINTERRUPTIBLE_LOOKS):
        if look and stuck:
            time.sleep(UNINTERRUPTIBLE_PAUSE)
        stuck = [tid for tid in stuck if _state(target.process, tid) == "D"]
        for tid in stuck:
            if _call(target.process, tid) in CLONING_CALLS.get(os.uname().machine, ()):
                return Refusal(
                    "vfork", f"thread {tid} waits in vfork for its child to exec or exit, and cannot be stopped"
                )
    if stuck:
        return Refusal("uninterruptible", f"thread {stuck[0]} is in uninterruptible sleep (D), and cannot be stopped")
    return None


def _state(process: Process, tid: int) -> str:
    text = read_task_file(process, tid, "stat")
    return text[text.rindex(b")") + 2 :].split()[0].decode() if text else ""


def _call(process: Process, tid: int) -> int:
    """Return the number of the system call that a thread waits in, -1 if in none."""
    words = (read_task_file(process, tid, "syscall") or b"").split()
    return int(words[0]) if len(words) > 2 else -1


def _padding(target: _Target) -> Refusal | None:
    """Refuse a target without padding behind its code, where the boot code runs (:mod:`~mthp.linux.mover.padding`)."""
    try:
        with ProcessMemory(target.process) as memory:
            find_padding(target.process, native().slot_bytes, memory.read)
    except UnsupportedError as error:
        return Refusal("padding", error.message, error.help)
    return None
