"""The machine's switches and tunables: read before every piece of work, parsed when they changed.

Reading an open file of sysfs again takes about a microsecond.

One tunable may be set, too: :class:`Keeping` keeps max_ptes_none of the kernel's khugepaged at a number while the
daemon runs, and puts it back. At its default khugepaged makes huge folios of the small ones that the daemon makes
(:mod:`mthp.engine.lasting`). The daemon puts the number back at its end; the watcher of the journal does if the daemon
is killed; the next mthp does if both are killed (:mod:`mthp.linux.journal`). The daemon itself continues to use the
number from before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from mthp.daemon.loop import Loop
from mthp.errors import MthpError, NotPermittedError, UnsupportedError, UsageError
from mthp.geometry import Geometry
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.sysfs import ThpSysfs
from mthp.tunables import Switches, Tunables


class SystemKnobs:
    """Switches and tunables of this machine.

    Args:
        sysfs: the THP directory.
        lock: the lock file of windows; None to check no lock.
    """

    def __init__(self, sysfs: ThpSysfs, geometry: Geometry, lock: Path | None = None) -> None:
        self._sysfs, self._geometry, self._lock = sysfs, geometry, lock
        self._files = {path: _open(sysfs.root / path) for path in _paths(sysfs, geometry)}
        self._texts: dict[str, bytes] = {}
        self._kept: dict[str, tuple[str, str]] = {}
        self.switches = Switches.defaults(geometry)
        self.tunables = Tunables.defaults(geometry)
        self.version = 0
        """Number of changes so far."""
        self.refresh()

    def refresh(self) -> bool:
        """Read the files again, and return whether anything changed."""
        with _unless_locked(self._lock) as undisturbed:
            if not undisturbed:
                # Another mthp is in a window: it has set switches to make folios of one order (mthp.linux.journal),
                # and the operator did not choose these values.
                return False
            texts = {path: text for path, fd in self._files.items() if (text := _read(fd)) is not None}
        if texts == self._texts:
            return False
        self._texts = texts
        words = {path: text.decode(errors="replace") for path, text in texts.items()}
        for path, (ours, was) in self._kept.items():
            if words.get(path, "").strip() == ours:
                words[path] = was
        # An unknown word of a newer kernel, or a number out of range, must not stop the daemon: keep the last values.
        with contextlib.suppress(MthpError):
            self.switches = Switches.from_sysfs(words, self._geometry)
        with contextlib.suppress(MthpError):
            prefix = "khugepaged/"
            knobs = {path.removeprefix(prefix): word for path, word in words.items() if path.startswith(prefix)}
            self.tunables = Tunables.from_sysfs(knobs, self._geometry)
        self.version += 1
        return True

    def word(self, path: str) -> str:
        """Return the last text of a file, by its path below the THP directory."""
        return self._texts.get(path, b"").decode(errors="replace").strip()

    def keep(self, path: str, ours: str | None, was: str) -> None:
        """Read the word `ours` in a file as `was`, the operator's choice; None to read it as it is again."""
        self._kept = {} if ours is None else {path: (ours, was)}
        self._texts = {}

    def close(self) -> None:
        """Close the files."""
        for fd in self._files.values():
            if fd >= 0:
                os.close(fd)
        self._files = {}


def _paths(sysfs: ThpSysfs, geometry: Geometry) -> list[str]:
    sizes = [f"{path.name}/enabled" for path in sysfs.size_directories(geometry.page_size).values()]
    return ["enabled", *sizes, *(f"khugepaged/{knob.name}" for knob in dataclasses.fields(Tunables))]


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return -1


def _read(fd: int) -> bytes | None:
    try:
        return os.pread(fd, 256, 0) if fd >= 0 else None
    except OSError:
        return None


@contextlib.contextmanager
def _unless_locked(path: Path | None) -> Iterator[bool]:
    """Hold the shared lock of a file, and yield False if another process holds it exclusively."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC) if path else -1
    except OSError:
        fd = -1
    try:
        if fd >= 0:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        if fd >= 0:
            os.close(fd)


TUNABLE = "khugepaged/max_ptes_none"

RETRY_SECONDS = 5.0
"""Seconds between two tries while another mthp is in a window."""


class Keeping:
    """The kept tunable.

    Args:
        knobs: receives the value from before.
        loop: schedules the next try.
        say: prints a line for the operator.
        journal: journal of the switches; the system's if not given.
    """

    def __init__(
        self, knobs: SystemKnobs, loop: Loop, say: Callable[[str], None], journal: SwitchJournal | None = None
    ) -> None:
        self._knobs, self._loop, self._say = knobs, loop, say
        self._journal = journal or SwitchJournal()
        self._wanted: int | None = None
        self._kept: int | None = None
        self._delayed_by = ""

    def keep(self, number: int | None) -> None:
        """Keep the tunable at `number` from now on, or soon; None to put back the value from before."""
        self._wanted = number
        if number == self._kept:
            return
        try:
            self._put_back()
            if number is not None:
                self._set(number)
        except (NotPermittedError, UnsupportedError, UsageError) as error:
            self._say(f"{TUNABLE} stays as it is: {error.message}")
        except MthpError as error:
            if error.message != self._delayed_by:
                self._say(f"{TUNABLE} is set later: {error.message}")
            self._delayed_by = error.message
            self._loop.after("keep", RETRY_SECONDS, lambda: self.keep(self._wanted))

    def _set(self, number: int) -> None:
        """Set the tunable.

        Raises:
            MthpError: another process keeps it, or does not finish its window in time.
        """
        was = self._knobs.word(TUNABLE)
        # Before the write, because from then on the worker reads a value that the operator did not choose.
        self._knobs.keep(TUNABLE, str(number), was)
        try:
            self._journal.keep({TUNABLE: str(number)})
        except MthpError:
            self._knobs.keep(TUNABLE, None, "")
            raise
        self._kept = number
        self._say(f"{TUNABLE} is {number} for as long as this daemon runs; it was {was}")

    def _put_back(self) -> None:
        """Put back the value from before.

        Raises:
            MthpError: another process does not finish its window in time.
        """
        if self._kept is None:
            return
        restored = self._journal.release()
        self._kept = None
        self._knobs.keep(TUNABLE, None, "")
        for each in restored:
            self._say(str(each))

    def close(self) -> None:
        """Put back the value from before, or leave that to the watcher of the journal if it fails now."""
        self._wanted = None
        try:
            self._put_back()
        except MthpError as error:
            self._say(f"{TUNABLE} is put back when this process has ended: {error.message}")
