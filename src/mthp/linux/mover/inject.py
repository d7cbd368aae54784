"""Bring the stub into a target, once, and take it out again.

There is no code of ours in the target yet, so one of its threads is made to do system calls: it is given registers that
point at a ``syscall`` instruction of the vdso, and is run from one system call stop to the next. (Single-stepping would
be shorter, but the SIGTRAP of a step is forced on the thread, and that resets a handler of the target's for SIGTRAP if
the signal is blocked or ignored: force_sig_info_to_task, kernel/signal.c.)

While that thread has such registers, our death would leave it with them. So for this short time, once per target and
again at the end, PTRACE_O_EXITKILL is set: if we die now, the target dies with us, but is never left running with wrong
registers. All of what comes between, the moving itself, survives us. The thread is given a real-time policy for as
long, if that is allowed, so that the time is short on a busy machine too.

What is injected::

    mmap      R-X, for all of it; a mapping that is to be executable must be so from the start (PR_SET_MDWE)
    mprotect  RW- for all but the code; the code is written through /proc/PID/mem, which does not need PROT_WRITE
    madvise   MADV_DONTFORK: a child of the target has no use for it
    userfaultfd(O_CLOEXEC | UFFD_USER_MODE_ONLY)
    fcntl     F_DUPFD_CLOEXEC, and close: a program that closes a descriptor counts on the next one to have its number
    madvise   MADV_DONTNEED of the scratch area, which nothing may lie in; locked memory (mlockall(2)) refuses it

Whatever else there is to do with the descriptor we do ourselves, with a copy of it (pidfd_getfd(2)): UFFDIO_API with
UFFD_FEATURE_MOVE, and UFFDIO_REGISTER of the scratch area. A userfaultfd belongs to the address space that it was made
in, whoever holds it.

The VMA layout is as before once all of it is unmapped. The descriptor is closed only if it still is a userfaultfd, and
nothing is unmapped if the program has mapped something of its own over a part of it.

A target may be frozen by its cgroup: it stops for a tracer, but runs nothing until it is thawed. That is refused
beforehand; if it happens now, the thread gets its registers back after some seconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import secrets
import struct
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from mthp.errors import MthpError, NotPermittedError, TargetVanishedError, UnsupportedError
from mthp.linux.mover import ptrace, stub
from mthp.linux.mover.freeze import WORKER_TIMEOUT_NS, FrozenProcess
from mthp.linux.mover.kcmp import KCMP_FILES, kcmp
from mthp.linux.mover.machine import Machine
from mthp.linux.mover.reentry import SYSCALL_STOP
from mthp.linux.mover.steps import Observer, Step
from mthp.linux.mover.taskfiles import read_task_file
from mthp.linux.mover.tracee import CannotStopError, Tracee
from mthp.linux.probes import UFFD_API, UFFD_FEATURE_MOVE, UFFD_USER_MODE_ONLY, UFFDIO_API, UFFDIO_API_ARG
from mthp.linux.process import Process

PROT_READ, PROT_WRITE, PROT_EXEC = 1, 2, 4
MAP_PRIVATE, MAP_ANONYMOUS, MAP_NORESERVE = 0x02, 0x20, 0x4000
MADV_DONTNEED, MADV_DONTFORK = 4, 10

F_DUPFD_CLOEXEC = 1030

UFFDIO_REGISTER = 0xC020AA00
UFFDIO_REGISTER_MODE_MISSING = 1
"""include/uapi/linux/userfaultfd.h."""

NR_PIDFD_GETFD = 438
"""The same on all architectures (asm/unistd.h)."""

_NO_FD = (1 << 64) - 1
_MAX_ERRNO = 4095
_POLL_SECONDS = 5e-6
_SPIN_NS = 200_000
_MIN_THREADS = 64
_NUMBERS_TRIED = 64

_libc = ctypes.PyDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.syscall.argtypes = (ctypes.c_long,) * 4


class RemoteError(OSError):
    """A system call that the target made for us failed."""


class RemoteCalls:
    """System calls made by a thread of a stopped target. A context manager; leaving it puts the thread back.

    Args:
        frozen: the target.
        observer: told when the thread is ours.

    Raises:
        UnsupportedError: the target has no vdso.
        CannotStopError: the thread must not be given our code, by now.
    """

    def __init__(self, frozen: FrozenProcess, observer: Observer) -> None:
        self._frozen = frozen
        self._observer = observer
        self._machine = frozen.machine
        self._tracee = choose(frozen)
        frozen.check_thread(self._tracee.tid)
        self._running = False
        self._syscall = _syscall_address(frozen)
        self._hurried = False

    def __enter__(self) -> Self:
        tid = self._tracee.tid
        ptrace.set_options(tid, ptrace.PTRACE_O_EXITKILL | ptrace.PTRACE_O_TRACESYSGOOD)
        self._tracee.touched = True
        ptrace.set_signal_mask(tid, ptrace.ALL_SIGNALS)
        self._hurry()
        return self

    def _hurry(self) -> None:
        """Have the thread run as soon as it can: on a busy machine, waiting for a CPU would be most of the time.

        The policy is changed only where it is the ordinary one, which keeps the nice value, so that it can be put back.
        """
        with contextlib.suppress(OSError):
            if os.sched_getscheduler(self._tracee.tid) == os.SCHED_OTHER:
                os.sched_setscheduler(self._tracee.tid, os.SCHED_FIFO, os.sched_param(1))
                self._hurried = True

    def _calm_down(self) -> None:
        if self._hurried:
            os.sched_setscheduler(self._tracee.tid, os.SCHED_OTHER, os.sched_param(0))
            self._hurried = False

    @property
    def tid(self) -> int:
        """The thread that makes them."""
        return self._tracee.tid

    def call(self, name: str, *arguments: int) -> int:
        """Make one system call and give its result.

        Raises:
            RemoteError: it failed.
            TargetVanishedError: the target was killed.
            CannotStopError: the thread does not run.
        """
        tid, machine = self._tracee.tid, self._machine
        registers = self._tracee.home.copy()
        machine.leave_call(registers)
        registers[0, machine.pc], registers[0, machine.number] = self._syscall, machine.calls[name]
        for field, value in itertools.zip_longest(machine.arguments, arguments, fillvalue=0):
            registers[0, field] = value
        ptrace.set_registers(tid, registers)
        self._observer(Step.HIJACKED)
        self._to_syscall_stop()
        self._to_syscall_stop()
        result = int(ptrace.get_registers(tid, machine.words)[0, machine.result])
        error = (1 << 64) - result
        if error <= _MAX_ERRNO:
            raise RemoteError(error, os.strerror(error))
        return result

    def _to_syscall_stop(self) -> None:
        tid = self._tracee.tid
        ptrace.run_to_syscall(tid)
        self._running = True
        self._frozen.ran.add(tid)
        now = time.monotonic_ns()
        impatient, deadline = now + _SPIN_NS, now + WORKER_TIMEOUT_NS
        while (stop := self._frozen.poll(tid)) != SYSCALL_STOP:
            if stop is not None:
                # SIGSTOP, which cannot be blocked, or the stop of the group that follows it.
                ptrace.run_to_syscall(tid, 0 if stop >> 8 else stop & 0xFF)
            elif self._frozen.has_exited(tid):
                raise TargetVanishedError(f"process {self._frozen.process.label} was killed")
            elif time.monotonic_ns() > deadline:
                raise CannotStopError(
                    f"thread {tid} of process {self._frozen.process.label} does not run",
                    help="its cgroup is frozen, or leaves it no time: try again later",
                )
            elif self._hurried and time.monotonic_ns() < impatient:
                # To sleep would take longer than the call. On one processor the thread runs now, having our priority.
                os.sched_yield()
            else:
                time.sleep(_POLL_SECONDS)
        self._running = False

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, TargetVanishedError):
            return
        tid = self._tracee.tid
        # The kernel restarts an interrupted system call only on the way out of a signal stop, so it must be in one.
        ptrace.interrupt(tid)
        if not self._running:
            ptrace.cont(tid)
        if not self._frozen.await_event_stop(tid):
            raise TargetVanishedError(f"process {self._frozen.process.label} was killed")
        self._calm_down()
        self._tracee.put_back()
        ptrace.set_options(tid, 0)


def choose(frozen: FrozenProcess) -> Tracee:
    """The thread to be given our registers: one outside restartable sequences, if there is one.

    It has the table of files of the first thread, in which the userfaultfd is.
    """
    pid, tracees = frozen.process.pid, list(frozen.tracees.values())
    chosen = next((tracee for tracee in tracees if not tracee.rseq_abort), tracees[0])
    if chosen.tid != pid and kcmp(pid, chosen.tid, KCMP_FILES) not in (0, None):
        return frozen.tracees.get(pid, chosen)
    return chosen


def _syscall_address(frozen: FrozenProcess) -> int:
    """Address of a ``syscall`` instruction in the target's vdso.

    Raises:
        UnsupportedError: there is none.
        TargetVanishedError: the target was killed.
    """
    for line in frozen.process.read("maps").splitlines():
        if line.endswith(b"[vdso]"):
            start, _, end = line.split()[0].partition(b"-")
            base = int(start, 16)
            offset = find_instruction(frozen.read(base, int(end, 16) - base), frozen.machine)
            if offset >= 0:
                return base + offset
    # The mappings of a process that was just killed are gone, too.
    frozen.process.check_memory()
    raise UnsupportedError(
        f"process {frozen.process.label} has no vdso", help="the mover needs its syscall instruction (vdso=1)"
    )


def find_instruction(code: bytes, machine: Machine) -> int:
    """Where in `code`, which begins on a page, the machine's system call instruction is; -1 if nowhere."""
    offset = code.find(machine.syscall)
    while offset % machine.alignment and offset >= 0:
        offset = code.find(machine.syscall, offset + 1)
    return offset


@dataclass(frozen=True, slots=True)
class Injection:
    """What is in the target.

    Attributes:
        layout: where.
        uffd: the userfaultfd's number in the target.
        nonce: a number written into the header, to tell this injection from any other.
    """

    layout: stub.Layout
    uffd: int
    nonce: int

    def check(self, frozen: FrozenProcess) -> None:
        """Do nothing if all of it is still there, as it was written.

        Raises:
            TargetVanishedError: it is not; the process executed another program.
        """
        layout = self.layout
        try:
            code = frozen.read(layout.base, layout.code_size)
            (nonce,) = struct.unpack("=Q", frozen.read(layout.header + stub.NONCE_OFFSET, 8))
        except TargetVanishedError:
            raise
        except MthpError:
            nonce, code = 0, b""
        if nonce != self.nonce or not code.startswith(layout.executable):
            raise TargetVanishedError(
                f"process {frozen.process.label} has another memory than before", help="it executed another program"
            )

    def remove(self, frozen: FrozenProcess, observer: Observer) -> None:
        """Unmap and close all of it.

        Raises:
            TargetVanishedError: it is not there any more, or not all of it.
        """
        self.check(frozen)
        if not is_untouched(frozen.process.read("maps"), self.layout):
            raise TargetVanishedError(f"process {frozen.process.label} mapped memory of its own over the mover's")
        uffd = self.uffd if _is_userfaultfd(frozen, self.uffd) else _NO_FD
        with RemoteCalls(frozen, observer) as remote:
            _remove(remote, self.layout, uffd)
            observer(Step.UNMAPPED)


def inject(
    frozen: FrozenProcess, *, operations: int, scratch_size: int, observer: Observer, min_threads: int = _MIN_THREADS
) -> Injection:
    """Bring the stub into a stopped target, with room for twice its threads.

    Args:
        operations: blocks of one window.
        scratch_size: bytes of the largest block.

    Raises:
        UnsupportedError: the target's kernel or limits do not allow it.
        NotPermittedError: userfaultfd is forbidden to the target.
        TargetVanishedError: the target was killed.
        CannotStopError: it must not be given our code, or does not run.
    """
    planned = stub.Layout(0, max(min_threads, 2 * len(frozen.stopped.tids)), operations, scratch_size, frozen.machine)
    calls = RemoteCalls(frozen, observer)
    number = _descriptor(frozen.process, calls.tid)
    uffd = _NO_FD
    layout: stub.Layout | None = None
    try:
        with calls as remote:
            try:
                flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE
                base = remote.call("mmap", 0, planned.size, PROT_READ | PROT_EXEC, flags, _NO_FD, 0)
                layout = replace(planned, base=base)
                observer(Step.MAPPED)
                data = layout.size - layout.code_size
                remote.call("mprotect", layout.header, data, PROT_READ | PROT_WRITE)
                remote.call("madvise", base, layout.size, MADV_DONTFORK)
                remote.call("madvise", layout.scratch, layout.scratch_size, MADV_DONTNEED)
                uffd = remote.call("userfaultfd", os.O_CLOEXEC | UFFD_USER_MODE_ONLY)
                uffd = _out_of_the_way(remote, uffd, number)
            except RemoteError:
                if layout is not None:
                    _remove(remote, layout, uffd)
                raise
        injection = Injection(layout, uffd, secrets.randbits(64))
        try:
            _register(frozen.process, layout, uffd)
            frozen.write(layout.base, layout.executable)
            frozen.write(layout.header, stub.pack_header(layout, uffd, injection.nonce, stub.operations_for([], [], 0)))
        except (OSError, MthpError):
            with RemoteCalls(frozen, observer) as remote:
                _remove(remote, layout, uffd)
            raise
    except OSError as error:
        raise _explained(frozen.process.label, error) from error
    observer(Step.INJECTED)
    return injection


def _descriptor(process: Process, tid: int) -> int:
    """The highest free number in a thread's table of files as large as it is; -1 if none is seen near its end.

    A table that is shared by threads and must grow takes the kernel tens of milliseconds (expand_fdtable, fs/file.c).
    """
    status = (read_task_file(process, tid, "status") or b"").decode(errors="replace")
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("FDSize:")]
    last = int(sizes[0]) - 1 if sizes else -1
    files = Path(f"/proc/{process.pid}/task/{tid}/fd")
    near = range(last, max(last - _NUMBERS_TRIED, -1), -1)
    return next((number for number in near if not os.path.lexists(files / str(number))), -1)


def _out_of_the_way(remote: RemoteCalls, fd: int, number: int) -> int:
    """Give a descriptor the higher number that is free; it keeps its own where it may not have that (RLIMIT_NOFILE)."""
    if fd >= number:
        return fd
    try:
        moved = remote.call("fcntl", fd, F_DUPFD_CLOEXEC, number)
    except RemoteError:
        return fd
    remote.call("close", fd)
    return moved


def _register(process: Process, layout: stub.Layout, uffd: int) -> None:
    """Have the target's userfaultfd `uffd` cover the scratch area.

    Raises:
        OSError: the kernel refuses.
    """
    copy = int(_libc.syscall(NR_PIDFD_GETFD, process.pidfd, uffd, 0))
    if copy < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    try:
        fcntl.ioctl(copy, UFFDIO_API, struct.pack(UFFDIO_API_ARG, UFFD_API, UFFD_FEATURE_MOVE, 0))
        request = struct.pack("=4Q", layout.scratch, layout.scratch_size, UFFDIO_REGISTER_MODE_MISSING, 0)
        fcntl.ioctl(copy, UFFDIO_REGISTER, request)
    finally:
        os.close(copy)


def _remove(remote: RemoteCalls, layout: stub.Layout, uffd: int) -> None:
    remote.call("munmap", layout.base, layout.size)
    if uffd != _NO_FD:
        with contextlib.suppress(RemoteError):
            remote.call("close", uffd)


def is_untouched(maps: bytes, layout: stub.Layout) -> bool:
    """Whether the text `maps` of ``/proc/PID/maps`` shows where `layout` is what was injected, and nothing else."""
    begin, end = layout.extent
    found = []
    for line in maps.splitlines():
        span, permissions, _, _, inode = line.split()[:5]
        start, stop = (int(word, 16) for word in span.split(b"-"))
        if start < end and begin < stop:
            found.append((start, stop, permissions if inode == b"0" else b""))
    code, data = (begin, layout.header, b"r-xp"), (layout.header, layout.scratch, b"rw-p")
    # Once the target has closed the userfaultfd, nothing keeps the last two apart.
    return found in ([code, data, (layout.scratch, end, b"rw-p")], [code, (layout.header, end, b"rw-p")])


def _is_userfaultfd(frozen: FrozenProcess, fd: int) -> bool:
    try:
        return "userfaultfd" in str(Path(f"/proc/{frozen.process.pid}/fd/{fd}").readlink())
    except OSError:
        return False


def _explained(label: str, error: OSError) -> MthpError:
    if error.errno == errno.ESRCH:
        return TargetVanishedError(f"process {label} was killed")
    if error.errno in (errno.EPERM, errno.EACCES):
        return NotPermittedError(
            f"process {label} may not create a userfaultfd or executable memory: {error.strerror}",
            help="a security module forbids it to the target",
        )
    if error.errno == errno.ENOSYS:
        return UnsupportedError("this kernel has no userfaultfd", help="it takes CONFIG_USERFAULTFD")
    if error.errno == errno.EINVAL:
        return UnsupportedError(
            f"process {label}: UFFDIO_MOVE cannot be had", help="Linux 6.8 or later, and no mlockall(MCL_FUTURE)"
        )
    return UnsupportedError(f"process {label}: nothing can be injected: {error.strerror}")
