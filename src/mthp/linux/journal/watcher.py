"""The watcher process: it waits for the end of one mthp, its *owner*, and puts back the changes left in the journal.

:mod:`mthp.linux.journal.guard` starts it as ``python -I -S -c ...`` with a session of its own and all signals blocked,
so that the end of the owner's process group or terminal does not end the watcher. Its standard input is a pidfd of the
owner; its standard output is a pipe to the owner, to which it writes its PID when it is ready, and which ends with it.
"""

from __future__ import annotations

import contextlib
import os
import select
import time
from pathlib import Path

from mthp.errors import MthpError
from mthp.linux.journal.putback import put_back, settle
from mthp.linux.journal.store import Change, JournalFiles, stat_of

NAME = "mthp-watcher"
"""The name of the process: at most 15 bytes, TASK_COMM_LEN of the kernel without the terminating zero."""

OWNER, STATUS = 0, 1
"""File descriptors: a pidfd of the owner, and the pipe to it."""

TICK_SECONDS = 0.25
"""Seconds between two polls. One costs some 50 microseconds of processor time."""

STOPPED_TICKS = 4
"""Number of polls in a row after which a stopped owner is expected to stay so; a tracer stops it for less."""

IDLE_TICKS = 40
"""Number of polls without an open window, ten seconds, after which the watcher ends. The next window starts another."""

LOCK_SECONDS = 0.2
"""Seconds to wait for the lock of a dead owner. A child that was forked by other means than Python's may have
inherited it, and hold it for years."""

RETRY_SECONDS = 5.0
"""Seconds for which a write of a switch is repeated if the kernel refuses it. The entries stay for `doctor`."""


def main(root: str, sysfs: str, pid: str, owner: str) -> None:
    """Watch until the owner is gone, or has had no window for a while.

    Args:
        owner: prefix of the owner's entries, see :func:`mthp.linux.journal.store.owner_of`.
    """
    _detach()
    files = JournalFiles(Path(root), create=False)
    # The owner may be dead already, and with it the other end of the pipe. Python ignores SIGPIPE.
    with contextlib.suppress(BrokenPipeError):
        os.write(STATUS, str(os.getpid()).encode())
    Watcher(files, Path(sysfs), int(pid), owner).run()


def _detach() -> None:
    """Close everything inherited from the owner, and make the process hard to kill."""
    # Other libraries may have opened descriptors without O_CLOEXEC.
    os.closerange(STATUS + 2, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    # Lowering one's own value needs CAP_SYS_RESOURCE: __set_oom_adj() in fs/proc/base.c.
    for file, text in (("comm", NAME), ("oom_score_adj", "-1000")):
        with contextlib.suppress(OSError):
            Path(f"/proc/self/{file}").write_text(text)


class Watcher:
    """The watcher of one owner.

    Args:
        owner: prefix of its entries.
        status: the watcher's end of the pipe to it.
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
        # The pidfd reports the owner's death at once. Ticks are for what no descriptor reports: see _tick().
        while not poll.poll(TICK_SECONDS * 1000):
            if self._tick():
                return
        self._after_death()

    def _tick(self) -> bool:
        """Poll the owner once; return whether to end."""
        if self._files.empty:
            self._stopped = 0
            self._idle += 1
            return self._idle >= IDLE_TICKS and self._retire()
        self._idle = 0
        with contextlib.suppress(MthpError):
            # There are entries, and the lock is free: the owner has called execve(2), which closes its files.
            if self._settle():
                return False
        # A stopped owner holds the lock, so its switches are put back without it.
        self._stopped = self._stopped + 1 if self._owner_is_stopped() else 0
        # Once in each stop: a switch that has the same word later was set since.
        if self._stopped == STOPPED_TICKS:
            with contextlib.suppress(MthpError):
                # Kept changes are harmless while their owner is stopped.
                self._undo(kept=False)
        return False

    def _retire(self) -> bool:
        """Close the pipe, so that the owner knows that the watcher is gone, if no window is open."""
        if not self._files.try_lock():
            return False
        # An owner checks the pipe while it holds the lock, so the pipe closes either before that or after its window.
        os.close(self._status)
        return True

    def _owner_is_stopped(self) -> bool:
        try:
            return stat_of(self._pid)[:1] in ("T", "t")
        except OSError:
            return False

    def _after_death(self) -> None:
        """Put back the owner's changes, or wait until another mthp has done so."""
        begin = time.monotonic()
        pause = 0.001
        while time.monotonic() - begin < RETRY_SECONDS:
            with contextlib.suppress(MthpError):
                if self._settle() or not self._left():
                    return
                # Something that the owner forked still holds the lock, perhaps for years.
                if time.monotonic() - begin >= LOCK_SECONDS:
                    self._undo()
                    return
            time.sleep(pause)
            pause = min(2 * pause, TICK_SECONDS)

    def _settle(self) -> bool:
        """Put back all changes in the journal; return False if another process has the lock."""
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
        """Put back the owner's changes without the lock, and keep the entries, because changing them takes the lock.

        Another mthp that takes the lock puts back the entries of a dead owner before it opens a window.
        """
        left = [change for change in self._left() if kept or not change.kept]
        put_back(self._sysfs, left)
        self._undone.update(left)
