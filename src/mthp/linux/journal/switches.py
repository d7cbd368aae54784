"""Set per-size switches for a moment and put them back; after this process's death the watcher does so.

Switches of the whole system, ``hugepages-<size>kB/enabled``, decide which folio a page fault brings. To get folios of
just one order the mover turns that size on and others off, for a *window* of milliseconds. None of its changes may
outlive it, so the steps are those of a database's undo log: take a lock, put back what a dead run left, have a watcher
(:mod:`mthp.linux.journal.guard`), record the changes, make them; afterwards put back, and empty the journal.

Windows may nest in one thread; other threads and other processes wait for their turn. The daemon may *keep* a tunable
of khugepaged for as long as it runs. Such an entry does not hold the lock. It comes before those of windows, and stays
while its owner runs; after that it is undone like any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import threading
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from mthp.errors import MthpError, NotPermittedError, UnsupportedError, UsageError
from mthp.linux.interruptions import interruptions_held_back, suspension_held_back
from mthp.linux.journal.guard import Guard, guard_of
from mthp.linux.journal.putback import Restored, path_of, put_back, read_word, settle, write_word
from mthp.linux.journal.store import Change, JournalFiles, all_roots, boot_id, default_root, owner_of
from mthp.linux.sysfs import ThpSysfs
from mthp.tunables import SIZE_WORDS

LOCK_TIMEOUT = 5.0
"""Seconds to wait for windows of other processes, each of which takes milliseconds."""

_numbers = itertools.count()
"""Numbers of the windows of this process."""


class SwitchJournal:
    """A setter of switches for a limited time. Threads may share one.

    Methods raise UnsupportedError if this kernel lacks a switch, or this user a runtime directory; NotPermittedError if
    these rights cannot set switches, or the journal's directory has another owner; and MthpError if another process
    does not finish its window in time.

    Args:
        root: directory of the journal; :func:`default_root` if not given.
        sysfs: the THP directory; the system's if not given.
        lock_timeout: seconds to wait for the windows of other processes.
        watched: whether a watcher process puts everything back if this one dies.
    """

    def __init__(
        self,
        root: Path | None = None,
        sysfs: ThpSysfs | None = None,
        *,
        lock_timeout: float = LOCK_TIMEOUT,
        watched: bool = True,
    ) -> None:
        self._root = root
        self._sysfs = sysfs or ThpSysfs()
        self._lock_timeout = lock_timeout
        self._watched = watched
        self._guard: Guard | None = None
        self._turn = threading.RLock()
        self._changes: list[Change] = []
        self._files: JournalFiles | None = None

    def only(self, order: int, *, off: Container[int] | None = None) -> AbstractContextManager[None]:
        """Return a window in which `order` is the only enabled size.

        Switches that are off, or inherit from a top-level ``never``, are not touched.

        Args:
            order: its size's switch is set to ``always``, the switches of all others that are on to ``never``.
            off: the orders that have to be off, if not all others: those with folios that would fit as well.
        """
        return self._window(lambda: self._wanted(order, off))

    def settings(self, wanted: Mapping[str, str]) -> AbstractContextManager[None]:
        """Return a window in which switches of sizes and tunables of khugepaged are as `wanted`, set in that order.

        Args:
            wanted: words by path below the THP directory, such as ``"khugepaged/pages_to_scan"``.
        """
        return self._window(lambda: self._differing(wanted))

    def keep(self, wanted: Mapping[str, str]) -> None:
        """Set the words in `wanted`, as :meth:`settings`, until :meth:`release` or the end of this process.

        Windows of any process may open and close meanwhile.

        Raises:
            MthpError: another process keeps one of them.
        """
        with self._turn, interruptions_held_back():
            if not self._may_have_to_write(self._differing(wanted)):
                return
            self._open(create=True)
            try:
                # After _open() has settled the journal, entries are left only by processes that still run.
                others = {change.switch for change in self._changes}
                if taken := sorted(others & set(wanted)):
                    raise MthpError(f"{taken[0]} is kept by another process", help="end that mthp daemon first")
                depth = len(self._changes)
                try:
                    self._set(self._differing(wanted), kept=True)
                except MthpError:
                    self._put_back_to(depth)
                    raise
            finally:
                self._close()

    def release(self) -> list[Restored]:
        """Put back all that this process keeps; return the results."""
        with self._turn, interruptions_held_back():
            self._open(create=True)
            try:
                ours = [change for change in self._changes if change.owner.startswith(f"{owner_of(os.getpid())}:")]
                restored = put_back(self._sysfs.root, ours, self._write)
                assert self._files is not None
                self._files.write([change for change in self._changes if change not in ours])
                return restored
            finally:
                self._close()

    @contextlib.contextmanager
    def _window(self, changes: Callable[[], list[Change]]) -> Iterator[None]:
        """Open a window with `changes`, which is called once the lock is held."""
        # Ctrl-Z in a window would leave the system's switches changed until the user types `fg`.
        with self._turn, suspension_held_back():
            if not self._may_have_to_write(changes()):
                yield
                return
            undo = contextlib.ExitStack()
            try:
                with interruptions_held_back():
                    if self._files is None:
                        self._open(create=True)
                        undo.callback(self._close)
                    # Registered before the first write, so that a part of the changes is undone, too.
                    undo.callback(self._put_back_to, len(self._changes))
                    self._set(changes())
                yield
            finally:
                try:
                    with interruptions_held_back():
                        undo.close()
                finally:
                    # Ctrl-C may have come just before signals were held back. Nothing is undone twice.
                    undo.close()

    def _may_have_to_write(self, wanted: Sequence[Change]) -> bool:
        """Return whether a window takes the lock. A process that cannot and need not set a switch needs no lock.

        Raises:
            NotPermittedError: a switch would have to be set, and may not be.
        """
        for change in wanted:
            path = path_of(self._sysfs.root, change.switch)
            if not os.access(path, os.W_OK, effective_ids=os.access in os.supports_effective_ids):
                raise NotPermittedError(
                    f"{path} is {change.was}, would have to be {change.ours}, and may not be written",
                    help=f"run as root with /sys mounted read-write, or have root do it: echo {change.ours} > {path}",
                )
        # Root takes the lock even to write nothing: another process's window may change the switches meanwhile.
        return bool(wanted) or os.geteuid() == 0

    def restore_after_crash(self) -> list[Restored]:
        """Put back the changes of a run that was killed in its window; return the results. Waits for open windows."""
        with self._turn, interruptions_held_back():
            # A window of this process has put back all leftovers when it was opened.
            if self._files is not None or not (self._root or default_root()).exists():
                return []
            restored = self._open(create=False)
            self._close()
            return restored

    @classmethod
    def restore_all(cls) -> list[Restored]:
        """Do :meth:`restore_after_crash` for every journal of this user."""
        return [restored for root in all_roots() for restored in cls(root).restore_after_crash()]

    def _open(self, *, create: bool) -> list[Restored]:
        """Take the lock, and put back the changes found in the journal."""
        files = JournalFiles(self._root or default_root(), create=create)
        try:
            # Two windows at once would take each other's words for the original ones.
            files.lock(self._lock_timeout)
            # The lock is free, so the writer of any entry died in its window.
            restored = settle(files, self._sysfs.root, write=self._write)
        except BaseException:
            files.close()
            raise
        self._files = files
        self._changes = files.read()
        return restored

    def _close(self) -> None:
        if self._guard is not None:
            self._guard.reap()
        if self._files is not None:
            self._files.close()
        self._files = None
        self._changes = []

    def _wanted(self, order: int, must_be_off: Container[int] | None) -> list[Change]:
        """Return the changes that leave one size on, those that turn something off first."""
        page_size = os.sysconf("SC_PAGESIZE")
        words = {
            other: (switch, found)
            for other, directory in self._sysfs.size_directories(page_size).items()
            if (found := read_word(self._sysfs.root, switch := f"{directory.name}/enabled")) is not None
        }
        if order not in words:
            raise UnsupportedError(
                f"this kernel has no switch for folios of order {order}", help="Linux 6.8 or later has one for each"
            )
        top_is_off = "[never]" in (self._sysfs.text("enabled") or "")
        boot = boot_id()
        off, on = [], []
        for other, (switch, was) in words.items():
            if other != order and must_be_off is not None and other not in must_be_off:
                continue
            if was not in SIZE_WORDS:
                raise UnsupportedError(f"{switch} is {was!r}, which this version does not know", help="a newer mthp")
            if other == order and was != "always":
                on.append(Change(switch, was, "always", boot))
            elif other != order and was != "never" and not (was == "inherit" and top_is_off):
                off.append(Change(switch, was, "never", boot))
        return off + on

    def _differing(self, wanted: Mapping[str, str]) -> list[Change]:
        boot = boot_id()
        changes = []
        for switch, word in wanted.items():
            was = read_word(self._sysfs.root, switch)
            if was is None:
                raise UnsupportedError(f"this kernel has no {switch}", help="Linux 7.2 or later has all of them")
            change = Change(switch, was, word, boot)
            if Change.parse(json.dumps(dataclasses.asdict(change)).encode()) is None:
                raise UsageError(f"{switch} cannot be set from {was!r} to {word!r}")
            if was != word:
                changes.append(change)
        return changes

    def _set(self, changes: Sequence[Change], *, kept: bool = False) -> None:
        """Record `changes`, then make them; `kept` ones do not belong to a window."""
        assert self._files is not None
        if not changes:
            return
        if self._watched:
            self._guard = guard_of(self._root or default_root(), self._sysfs.root)
            # Before the first change: if this process dies, the watcher puts it back within milliseconds.
            self._guard.ensure(self._files.identity)
        owner = f"{owner_of(os.getpid())}:{next(_numbers)}"
        self._changes += [dataclasses.replace(change, owner=owner, kept=kept) for change in changes]
        # On the disk before any switch is touched: a lost entry would be a change that nothing undoes.
        self._files.write(self._changes)
        for change in changes:
            self._write(change.switch, change.ours)

    def _put_back_to(self, depth: int) -> None:
        """Undo all changes but the first `depth`, which belong to outer windows."""
        assert self._files is not None
        put_back(self._sysfs.root, self._changes[depth:], self._write)
        del self._changes[depth:]
        self._files.write(self._changes)
        if all(change.kept for change in self._changes) and not all(change.holds for change in self._changes):
            # A process that kept something died in this window, and its watcher does not wait for the window's end.
            settle(self._files, self._sysfs.root, write=self._write)
            self._changes = self._files.read()

    def _write(self, switch: str, word: str) -> None:
        write_word(self._sysfs.root, switch, word)
