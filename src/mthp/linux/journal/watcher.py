"""The watcher process: it waits for the end of one mthp, its *owner*, and puts back what that has left in the journal.

It is started by :mod:`mthp.linux.journal.guard` as ``python -I -S -c ...`` with a session of its own and all signals
blocked, so that what ends the owner's process group or terminal does not end the watcher. Its standard input is a
pidfd of the owner; its standard output is a pipe to which it writes its PID when it is ready, and whose closing tells
the owner that there is no watcher any more.

It polls slowly, for what no file descriptor reports: whether the owner is stopped, and whether the journal has entries
although its lock is free (the owner replaced itself by execve(2)).
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from pathlib import Path

from mthp.errors import MthpError
from mthp.linux.journal.files import Change, JournalFiles, stat_of
from mthp.linux.journal.putback import put_back, settle

NAME = "mthp-watcher"
"""The name of the process: at most 15 bytes, TASK_COMM_LEN of the kernel without the terminating zero."""

OWNER, STATUS = 0, 1
"""File descriptors: a pidfd of the owner, and the pipe to it."""

TICK_SECONDS = 0.25
"""From one poll to the next. One costs some 50 microseconds of processor time."""

STOPPED_TICKS = 4
"""An owner that is stopped at this many polls in a row is taken to stay so; a tracer stops it for less."""

IDLE_TICKS = 40
"""After this many polls without an open window, ten seconds, the watcher ends. The next window starts another."""

LOCK_SECONDS = 0.2
"""How long the watcher waits for the lock of a dead owner. A child that was forked by other means than Python's may
have inherited it, and hold it for years."""

RETRY_SECONDS = 5.0
"""How long the watcher tries again when the kernel refuses to write a switch. The entries stay for `doctor`."""


def main(root: str, sysfs: str, pid: str, owner: str) -> None:
    """Watch until the owner is gone, or has had no window for a while.

    Args:
        owner: what the owner's entries begin with, see :func:`mthp.linux.journal.files.owner_of`.
    """
    _detach()
    files = JournalFiles(Path(root), create=False)
    # The owner may be dead already, and with it the other end of the pipe. Python ignores SIGPIPE.
    with contextlib.suppress(BrokenPipeError):
        os.write(STATUS, str(os.getpid()).encode())
    Watcher(files, Path(sysfs), int(pid), owner).run()


def _detach() -> None:
    """Keep nothing of the owner, and be hard to kill."""
    # Descriptors that other libraries opened without O_CLOEXEC.
    os.closerange(STATUS + 2, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    # To lower one's own value takes CAP_SYS_RESOURCE: __set_oom_adj() in fs/proc/base.c.
    for file, text in (("comm", NAME), ("oom_score_adj", "-1000")):
        with contextlib.suppress(OSError):
            Path(f"/proc/self/{file}").write_text(text)


class Watcher:
    """Watches one owner.

    Args:
        files: the journal.
        owner: what its entries begin with.
        status: end of the pipe to it.
    """

    def __init__(self, files: JournalFiles, sysfs: Path, pid: int, owner: str, status: int = STATUS) -> None:
        self._files, self._sysfs, self._status = files, sysfs, status
        self._pid, self._owner = pid, owner
        self._idle = self._stopped = 0
        self._undone: set[Change] = set()

    def run(self) -> None:
        """Return when there is nothing to watch any more."""
        poll = select.poll()
        poll.register(OWNER, select.POLLIN)
        while not poll.poll(TICK_SECONDS * 1000):
            if self._tick():
                return
        self._after_death()

    def _tick(self) -> bool:
        """Poll the owner once. Return whether to end."""
        if self._files.empty:
            self._stopped = 0
            self._idle += 1
            return self._idle >= IDLE_TICKS and self._retire()
        self._idle = 0
        with contextlib.suppress(MthpError):
            if self._settle():
                return False
        self._stopped = self._stopped + 1 if self._owner_is_stopped() else 0
        # Once in each stop: what has the same word later was set since.
        if self._stopped == STOPPED_TICKS:
            with contextlib.suppress(MthpError):
                # What is kept harms nothing while its owner is stopped.
                self._undo(kept=False)
        return False

    def _retire(self) -> bool:
        """Tell the owner that there is no watcher any more, if no window is open."""
        if not self._files.try_lock():
            return False
        # An owner looks at the pipe while it holds the lock, so this happens either before that or after its window.
        os.close(self._status)
        return True

    def _owner_is_stopped(self) -> bool:
        try:
            return stat_of(self._pid)[:1] in ("T", "t")
        except OSError:
            return False

    def _after_death(self) -> None:
        """Put back what the owner left, or see that another mthp has done so."""
        begin = time.monotonic()
        pause = 0.001
        while time.monotonic() - begin < RETRY_SECONDS:
            with contextlib.suppress(MthpError):
                if self._settle() or not self._left():
                    return
                if time.monotonic() - begin >= LOCK_SECONDS:
                    self._undo()
                    return
            time.sleep(pause)
            pause = min(2 * pause, TICK_SECONDS)

    def _settle(self) -> bool:
        """Put back whatever stands in the journal. Return False if another process has the lock."""
        if not self._files.try_lock():
            return False
        try:
            settle(self._files, self._sysfs, but=self._undone)
        finally:
            self._files.unlock()
        return True

    def _left(self) -> list[Change]:
        """Return the entries of the owner that were not put back yet."""
        prefix = self._owner + ":"
        entries = [change for change in self._files.read() if change.owner.startswith(prefix)]
        return [change for change in entries if change not in self._undone]

    def _undo(self, *, kept: bool = True) -> None:
        """Put back what the owner left without the lock, and leave the entries, as only the lock allows to change them.

        Another mthp that takes the lock puts back the entries of a dead owner before it opens a window.
        """
        left = [change for change in self._left() if kept or not change.kept]
        put_back(self._sysfs, left)
        self._undone.update(left)
