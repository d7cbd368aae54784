"""One daemon at a time: a lock file that names its holder."""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from mthp.errors import MthpError, NotPermittedError

NAME = "daemon.lock"


class DaemonLock:
    """Held from the making of this object until :meth:`close`; the kernel releases it however the process ends.

    Args:
        directory: directory of the lock file.

    Raises:
        MthpError: another daemon holds it.
        NotPermittedError: the file cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        path = directory / NAME
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise NotPermittedError(
                f"{path}: {error.strerror}", help="run as root, or give a directory of yours with --run-dir"
            ) from error
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            # The file is written to, and under another name it might belong to another user.
            os.close(self._fd)
            raise NotPermittedError(f"{path} is no file of its own", help="remove it, or give another --run-dir")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._fd, 64, 0).decode(errors="replace").strip()
            os.close(self._fd)
            raise MthpError(
                f"another mthp daemon is running{f': process {holder}' if holder else ''}",
                help="`mthp status` asks it; end it first (systemctl stop mthp, or SIGTERM)",
            ) from None
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)

    def close(self) -> None:
        """Release the lock."""
        os.ftruncate(self._fd, 0)
        os.close(self._fd)
