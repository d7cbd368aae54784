"""Hold one process so that it cannot be mistaken for another.

The kernel assigns a PID to another process as soon as its owner is gone. A pidfd (pidfd_open(2)) refers to the process
itself, and so does an open directory ``/proc/PID``; so all reads and advice concern the process that was opened.

Ways to fail: the process is gone or a zombie (:class:`~mthp.errors.TargetVanishedError`), was a kernel thread from the
start (:class:`~mthp.errors.UnsupportedError`), or belongs to another user
(:class:`~mthp.errors.NotPermittedError`).
"""

from __future__ import annotations

import errno
import os
import select
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from mthp.closing import Closing
from mthp.errors import MthpError, NotPermittedError, TargetVanishedError, UnsupportedError, UsageError
from mthp.linux import abi
from mthp.text import lines

_PROC = Path("/proc")
_READ_CHUNK = 1 << 20
_GONE = (errno.ESRCH, errno.ENOENT)
_REFUSED = (errno.EACCES, errno.EPERM)


@dataclass(frozen=True, slots=True)
class ProcStat:
    """The fields of ``/proc/PID/stat`` that determine the kind of process, and its faults (proc_pid_stat(5)).

    Attributes:
        state: one letter; Z a zombie, X dead.
        flags: ``PF_*`` of include/linux/sched.h.
        minflt, majflt: faults without input and output, and faults with it.
        threads: number of its threads; an exited first thread counts.
        starttime: its start, in clock ticks since boot.
    """

    state: str
    ppid: int
    flags: int
    minflt: int
    majflt: int
    threads: int
    starttime: int

    @classmethod
    def parse(cls, text: bytes) -> ProcStat:
        """Read the text of ``/proc/PID/stat``; the name in it may contain spaces and parentheses."""
        fields = text[text.rindex(b")") + 2 :].split()
        ppid, flags, minflt, majflt, threads, starttime = (int(fields[index]) for index in (1, 6, 7, 9, 17, 19))
        return cls(fields[0].decode(), ppid, flags, minflt, majflt, threads, starttime)


class Process(Closing):
    """A handle of one living process. A context manager; leaving it closes the handle.

    Args:
        target: a PID, or ``"self"``.

    Attributes:
        comm: its name in the kernel (at most 15 bytes).
        pidfd: its file descriptor from pidfd_open(2).
        starttime: its start, in clock ticks since boot.

    Raises:
        TargetVanishedError: there is no such process, or it is a zombie.
        UnsupportedError: a kernel thread, a kernel without pidfds (before 5.3), or a /proc of another PID
            namespace.
        NotPermittedError: the process is hidden, or pidfd_open is filtered.
        UsageError: not a PID, or that of a thread.
    """

    def __init__(self, target: int | Literal["self"]) -> None:
        pid = os.getpid() if target == "self" else target
        if pid <= 0:
            raise UsageError(f"{pid} is not a PID", help="PIDs are positive; ps(1) and pgrep(1) list them")
        self.pid = pid
        self.is_self = pid == os.getpid()
        self.comm = ""
        _check_proc()
        self.pidfd = _open_pidfd(pid)
        self._directory = -1
        try:
            # The kernel looks files up through the struct pid for which the directory was opened (get_proc_task,
            # fs/proc/base.c): they fail with ESRCH once that process is gone, also when another one has the number.
            self._directory = self._open_directory()
            self.starttime = self._look()
        except MthpError:
            self.close()
            raise

    def _open_directory(self) -> int:
        try:
            return os.open(_PROC / str(self.pid), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            if error.errno in _GONE and self.is_alive():
                raise NotPermittedError(
                    f"/proc does not show process {self.pid}",
                    help="/proc is mounted with hidepid: run as the same user or with CAP_SYS_PTRACE",
                ) from None
            self.fail(error, "its directory in /proc")

    def _look(self) -> int:
        """Check the kind of process, and that directory and pidfd belong to the same one; return its start time."""
        stat = ProcStat.parse(self.read("stat"))
        self.comm = self.read("comm").decode(errors="replace").rstrip("\n")
        if stat.flags & abi.PF_KTHREAD:
            raise UnsupportedError(
                f"process {self.pid} ({self.comm}) is a kernel thread",
                help="kernel threads have no memory of their own: choose a user process",
            )
        # /proc/PID shows the first thread, which gave up its memory, while the process lives on.
        if stat.state == "Z" and stat.threads > 1:
            raise UnsupportedError(
                f"the first thread of process {self.pid} ({self.comm}) has exited, while others go on",
                help="/proc shows no memory of such a process",
            )
        if stat.state == "Z":
            # As for a process that exits later: a name may have found it a moment ago.
            raise TargetVanishedError(
                f"process {self.pid} ({self.comm}) is a zombie",
                help="it has exited and has no memory; its parent has not waited for it yet",
            )
        # The pidfd came first. A process that has not exited by now still owns its number, so the directory is its own.
        self.check_alive()
        return stat.starttime

    @property
    def label(self) -> str:
        """Return its name for users: ``"1234 (comm)"``."""
        return f"{self.pid} ({self.comm})"

    def is_alive(self) -> bool:
        """Return whether it has not exited yet. Never true for another process that took over the number."""
        # A new one each time, because threads may call this side by side, and a poll object serves one at a time.
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return not poll.poll(0)

    def check_alive(self) -> None:
        """Raise TargetVanishedError if it has exited."""
        if not self.is_alive():
            self._vanished()

    def check_memory(self) -> None:
        """Raise TargetVanishedError if it has no address space any more: it has exited, or is about to."""
        self.check_alive()
        if self._is_exiting():
            self._vanished()

    def _is_exiting(self) -> bool:
        # do_exit() (kernel/exit.c) takes the address space before the namespaces, without which mountinfo cannot be
        # opened (mounts_open_common(), fs/proc_namespace.c: EINVAL), and both before the pidfd reports the exit.
        return not any(int(field) for field in self.read("statm").split())

    def open(self, name: str) -> int:
        """Return a new file descriptor for reading ``/proc/PID/<name>``, which the caller closes.

        Raises:
            TargetVanishedError, NotPermittedError: it is gone, or belongs to another user.
            UnsupportedError: this kernel has no such file.
        """
        try:
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        except OSError as error:
            self.fail(error, f"/proc/{self.pid}/{name}")

    def read(self, name: str) -> bytes:
        """Return the whole of ``/proc/PID/<name>``, for files that are small; raise as :meth:`open` does."""
        fd = self.open(name)
        parts = []
        try:
            while part := os.read(fd, _READ_CHUNK):
                parts.append(part)
        except OSError as error:
            self.fail(error, f"/proc/{self.pid}/{name}")
        finally:
            os.close(fd)
        return b"".join(parts)

    def write(self, name: str, text: bytes) -> None:
        """Write `text` to ``/proc/PID/<name>``; raise as :meth:`open` does."""
        try:
            fd = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=self._directory)
            try:
                os.write(fd, text)
            finally:
                os.close(fd)
        except OSError as error:
            self.fail(error, f"/proc/{self.pid}/{name}")

    def status(self, field: str) -> str | None:
        """Return one field of ``/proc/PID/status``, such as ``"THP_enabled"``; None where the kernel lacks it."""
        return status_fields(self.read("status")).get(field)

    def advise(self, address: int, size: int, advice: int) -> int:
        """Advise one range of its memory, by process_madvise(2), or by madvise(2) if it is this process.

        Returns:
            0, or errno; EAGAIN also if only a part was advised.
        """
        if self.is_self:
            return abi.madvise(address, size, advice)
        return abi.process_madvise(self.pidfd, address, size, advice)

    def fail(self, error: OSError, what: str) -> NoReturn:
        """Raise this package's error for `error`, which occurred while using `what`."""
        # EINVAL comes from mountinfo: the namespaces are gone before the pidfd reports the exit.
        if error.errno == errno.ESRCH or not self.is_alive() or (error.errno == errno.EINVAL and self._is_exiting()):
            self._vanished()
        if error.errno in _REFUSED:
            raise NotPermittedError(
                f"not permitted to read process {self._name()}: {what}: {error.strerror}",
                help="run as the user of that process, or with CAP_SYS_PTRACE (root); a process that is not dumpable"
                " (prctl(2)) or that a security module guards needs the latter",
            ) from error
        if error.errno == errno.ENOENT:
            raise UnsupportedError(f"this kernel has no {what}", help="see `mthp doctor`") from error
        raise MthpError(f"process {self._name()}: {what}: {error.strerror}") from error

    def _vanished(self) -> NoReturn:
        raise TargetVanishedError(f"process {self._name()} is gone", help="it exited") from None

    def _name(self) -> str:
        return self.label if self.comm else str(self.pid)

    def close(self) -> None:
        for fd in (self.pidfd, self._directory):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self._directory = -1


def _check_proc() -> None:
    """Do nothing if PIDs in /proc are those of system calls (pid_namespaces(7)).

    Raises:
        UnsupportedError: otherwise files of one process would be read, and another one be advised or stopped.
    """
    try:
        ours = (_PROC / "self").readlink().name
    except OSError:
        # Without /proc, opening its files will raise an error.
        return
    if ours != str(os.getpid()):
        raise UnsupportedError(
            "/proc shows the processes of another PID namespace than this process's",
            help="mount it again (unshare --mount-proc, or mount -t proc proc /proc)",
        )


def _open_pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OverflowError:
        raise _no_process(pid) from None
    except OSError as error:
        if error.errno == errno.ESRCH:
            raise _no_process(pid) from None
        if error.errno in (errno.EINVAL, errno.ENOENT):
            # The kernel knows the number, but not as that of a process: EINVAL, since Linux 6.15 ENOENT.
            raise _thread_or_nothing(pid) from None
        if error.errno == errno.ENOSYS:
            raise UnsupportedError("this kernel has no pidfd_open", help="Linux 5.3 or later has it") from None
        raise NotPermittedError(
            f"pidfd_open of process {pid}: {error.strerror}",
            help="a seccomp filter (a container's) may forbid pidfd_open: allow it or run outside",
        ) from error


def _no_process(pid: int) -> TargetVanishedError:
    return TargetVanishedError(f"no process {pid}", help="ps(1) and pgrep(1) list processes")


def _thread_or_nothing(pid: int) -> MthpError:
    try:
        owner = status_fields((_PROC / str(pid) / "status").read_bytes()).get("Tgid")
    except OSError:
        return _no_process(pid)
    if owner in (None, str(pid)):
        return _no_process(pid)
    return UsageError(f"{pid} is a thread of process {owner}", help=f"use the PID {owner}")


def status_fields(text: bytes) -> dict[str, str]:
    """Return the fields of a text of ``/proc/PID/status``, or of that of a thread (proc_pid_status(5))."""
    pairs = (line.partition(":") for line in lines(text.decode(errors="replace")))
    return {name: value.strip() for name, _, value in pairs}


def list_pids(proc: str = "/proc") -> list[int]:
    """Return the PIDs of all processes at this moment, in no order."""
    names = os.listdir(proc)  # noqa: PTH208  (Path.iterdir makes an object of each)
    return [int(name) for name in names if name[0] in "123456789" and name.isdecimal()]


def ancestors() -> Iterator[int]:
    """Yield the PIDs of the parent of this process, of its parent, and so on, as far as /proc shows them."""
    pid = os.getppid()
    while pid > 0:
        yield pid
        try:
            pid = ProcStat.parse((_PROC / str(pid) / "stat").read_bytes()).ppid
        except OSError:
            return
