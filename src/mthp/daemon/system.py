"""The machine's switches and tunables: read before every piece of work, parsed when they changed.

Reading an open file of sysfs again takes about a microsecond.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mthp.errors import MthpError
from mthp.geometry import Geometry
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
