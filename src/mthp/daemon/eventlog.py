"""The event log: one JSON object a line, appended.

A full disk stops nothing: what cannot be written is counted, that is said once, and when writing works again a line
tells how much is missing. A line that was cut short by a full disk is ended first, so that readers can pass over it.

The daemon has all rights, and the file may be named in a directory in which others write, too. So links are followed
only if they are the daemon's user's or root's, and a file with several names is not written to.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mthp.errors import UsageError


class EventLog:
    """Appends events to a file.

    Args:
        path: the file.
        say: tells a person that events are lost, and that they are written again.

    Attributes:
        lost: events that could not be written since the last that could.

    Raises:
        UsageError: the file cannot be opened.
    """

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path = path
        self.lost = 0
        self._say = say
        self._turn = threading.Lock()
        self._cut = False
        try:
            self._fd = _open(path)
        except OSError as error:
            raise UsageError(f"event log {path}: {error.strerror}", help="give a file that can be written") from error

    def write(self, event: str, **values: Any) -> None:
        """Append one event. Never fails."""
        with self._turn:
            lines = []
            if self.lost:
                lines.append(_line("lost", {"count": self.lost}))
            lines.append(_line(event, values))
            text = (b"\n" if self._cut else b"") + b"".join(lines)
            try:
                written = os.write(self._fd, text)
            except OSError as error:
                self._missed(error.strerror or str(error))
                return
            if written < len(text):
                self._cut = True
                self._missed("the disk is full")
                return
            self._cut = False
            if self.lost:
                self._say(f"event log {self.path}: written again; {self.lost} events are missing")
            self.lost = 0

    def _missed(self, reason: str) -> None:
        if not self.lost:
            self._say(f"event log {self.path}: {reason}; events are lost")
        self.lost += 1

    def reopen(self) -> None:
        """Open the file anew: it may have been moved away (logrotate)."""
        with self._turn:
            try:
                fd = _open(self.path)
            except OSError as error:
                self._say(f"event log {self.path}: {error.strerror}; the old file is written on")
                return
            os.close(self._fd)
            self._fd = fd

    def close(self) -> None:
        """Close the file."""
        with self._turn:
            os.close(self._fd)
            self._fd = -1


def _open(path: Path) -> int:
    # Without O_NONBLOCK a pipe that nobody reads would hold us up.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        fd = os.open(path, flags | os.O_NOFOLLOW, 0o640)
    except OSError as error:
        if error.errno != errno.ELOOP or path.lstat().st_uid not in (0, os.geteuid()):
            raise
        fd = os.open(path, flags, 0o640)
    status = os.fstat(fd)
    if stat.S_ISREG(status.st_mode) and status.st_nlink > 1:
        os.close(fd)
        raise OSError(errno.EMLINK, "it has several names, of which one may be somebody else's")
    return fd


def _line(event: str, values: dict[str, Any]) -> bytes:
    time = datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")
    return json.dumps({"time": time, "event": event} | values).encode() + b"\n"
