"""The event log: one JSON object a line, appended.

A full disk stops nothing: lost events are counted, the operator is warned once, and when writing works again a line has
their number. A line that a full disk cut short is ended first, so that readers can skip it.
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
        say: prints a line when events are lost, and when writing works again.

    Attributes:
        lost: events lost since the last one that was written.

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
        """Open the file again, because logrotate may have moved it away."""
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
    # O_NONBLOCK, because a pipe without a reader would block the daemon.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    # The daemon has all rights, and other users may write to the directory. So links are followed only if they belong
    # to the daemon's user or to root, and a file with several names is not written to.
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
