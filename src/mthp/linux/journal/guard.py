"""Start the watcher of this process (:mod:`mthp.linux.journal.watcher`), and check whether it runs."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import sys
import time
from pathlib import Path

from mthp.errors import MthpError, UnsupportedError
from mthp.linux.journal import watcher
from mthp.linux.journal.store import owner_of

READY_SECONDS = 10.0
"""Seconds to wait for a second watcher if the first ended before it was ready."""

REAP_SECONDS = 0.5
"""Seconds to wait for the watcher's parent. It ends after some 10 ms, when its interpreter has started."""

# It forks first, and so becomes a child of init: a program that uses this library may wait for any child of its own.
_PROGRAM = """\
import os, sys
if os.fork():
    os._exit(0)
sys.path.append(sys.argv[1])
from mthp.linux.journal.watcher import main
main(*sys.argv[2:])
"""


class Guard:
    """The watcher of this process for one journal. The caller of each method holds the journal's lock."""

    def __init__(self, root: Path, sysfs: Path) -> None:
        self._root, self._sysfs = root, sysfs
        self._owner = 0
        """PID of the process that started the watcher. A child of fork(2) needs one of its own."""
        self._parent = self._status = -1
        self._journal = (0, 0)
        """Identity of the journal that the watcher has open."""
        self._watcher = b""
        """The text that the watcher wrote when it was ready: its PID."""

    def ensure(self, journal: tuple[int, int]) -> None:
        """Start a watcher if there is none.

        Args:
            journal: identity of the file, see :class:`~mthp.linux.journal.store.JournalFiles`.

        Raises:
            UnsupportedError: there is no interpreter to run it with.
            MthpError: it cannot be started.
        """
        first = self._owner != os.getpid()
        alive = not first and self._alive()
        if alive and journal == self._journal:
            return
        # The last one ended before it was ready: only then is it worth waiting to see whether this one does, too.
        failed = not first and not alive and not self._watcher
        if self._status >= 0:
            os.close(self._status)
            self._status = -1
        self.reap()
        self._journal = journal
        if not first:
            _reap_adopted(self._watcher)
        try:
            # No wait until it is ready: posix_spawn(3) returns once the program has been replaced, and after that the
            # death of this process cannot prevent its start.
            self._start()
        except OSError as error:
            raise MthpError(
                f"the watcher process cannot be started: {error.strerror}",
                help="allow this process to run another (limits of processes and memory, seccomp)",
            ) from error
        if failed and not (select.select([self._status], [], [], READY_SECONDS)[0] and self._alive()):
            raise MthpError(
                "the watcher process exits at its start",
                help=f"find out why: {_interpreter()} -I -S -c 'import json, pathlib, select'",
            )

    def _alive(self) -> bool:
        """Return whether the other end of the pipe is open."""
        while True:
            try:
                read = os.read(self._status, 16)
            except BlockingIOError:
                return True
            if not read:
                return False
            self._watcher = read

    def _start(self) -> None:
        python = _interpreter()
        pid = os.getpid()
        package = Path(__file__).parents[3]
        arguments = [package, self._root, self._sysfs, pid, owner_of(pid)]
        # The interpreter needs only the variables by which the dynamic linker finds its libraries.
        environment = {name: value for name, value in os.environ.items() if name.startswith("LD_")}
        with contextlib.ExitStack() as stack:
            owner = _opened(stack, os.pidfd_open(pid))
            ours, theirs = (_opened(stack, fd) for fd in os.pipe())
            actions = [
                (os.POSIX_SPAWN_DUP2, owner, watcher.OWNER),
                (os.POSIX_SPAWN_DUP2, theirs, watcher.STATUS),
                (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
            ]
            # Not a fork: one of a process with threads may hold their locks for ever, a large one costs page tables.
            self._parent = os.posix_spawn(
                python,
                # Isolated and without site: it starts quickly, whatever the environment and the user's packages are.
                [python, "-I", "-S", "-c", _PROGRAM, *map(str, arguments)],
                environment,
                file_actions=actions,
                setsid=True,
                # Blocked signals stay blocked in the new program, from its first instruction to its last.
                setsigmask=signal.valid_signals(),
            )
            self._status = os.dup(ours)
        # The pipe closes when the watcher ends: reading it without blocking shows whether it runs.
        os.set_blocking(self._status, False)
        self._owner, self._watcher = pid, b""

    def reap(self) -> None:
        """Reap the process that made the watcher."""
        begin = time.monotonic()
        while self._parent >= 0 and self._owner == os.getpid() and time.monotonic() - begin < REAP_SECONDS:
            try:
                done, _ = os.waitpid(self._parent, os.WNOHANG)
            except ChildProcessError:
                # The program ignores SIGCHLD, or waits for any child.
                done = self._parent
            if done:
                self._parent = -1
            else:
                time.sleep(0.001)


_guards: dict[tuple[Path, Path], Guard] = {}


def guard_of(root: Path, sysfs: Path) -> Guard:
    """Return this process's guard of the journal in `root`: one for all that change its switches."""
    key = (root.absolute(), sysfs.absolute())
    return _guards.setdefault(key, Guard(*key))


def _reap_adopted(pid: bytes) -> None:
    """Reap a watcher that ended, where this process adopts orphans, for example as PID 1 of a container."""
    with contextlib.suppress(OSError):
        # If the watcher is not a zombie of this process, its PID may be that of another child by now.
        if Path(f"/proc/{pid.decode()}/comm").read_text() == f"{watcher.NAME}\n":
            os.waitpid(int(pid), os.WNOHANG)


def _opened(stack: contextlib.ExitStack, fd: int) -> int:
    """Return a duplicate of `fd` above the standard ones, which the watcher's replace, closed with `stack`."""
    try:
        higher = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(fd)
    stack.callback(os.close, higher)
    return higher


def _interpreter() -> str:
    """Return the path of a Python like this one: in a program that embeds Python, `sys.executable` is that program."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for path in (sys.executable, f"{sys.base_exec_prefix}/bin/{name}"):
        if path and Path(path).name.startswith("python") and os.access(path, os.X_OK):
            return path
    raise UnsupportedError(
        f"Python interpreter {path} does not exist: it would put switches back if this process died",
        help=f"install {name}",
    )
