"""The directory that keeps the finished parts of a sweep, until all are done and one file takes its place.

It lies beside the result, maybe in a directory in which other users write, such as /tmp.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from pathlib import Path

from mthp.closing import Closing
from mthp.errors import UsageError
from mthp.files import writing

_OURS = re.compile(r"[0-9a-f]{32}\.(arrow|tmp)")


class PartsDirectory(Closing):
    """An open directory of parts. A context manager.

    Args:
        path: path of the directory, which is created if it does not exist.

    Raises:
        UsageError: it cannot be created, is not a directory, or other users may write in it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            # An earlier run's; or another user made it, which the status of the open directory shows.
            with contextlib.suppress(FileExistsError):
                path.mkdir(0o700)
            # A planted link may lead to any directory. The descriptor stays that of the checked one.
            self._fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise UsageError(f"{path} cannot be created: {getattr(error, 'strerror', None) or error}") from error
        status = os.fstat(self._fd)
        if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            self.close()
            raise UsageError(
                f"{path} belongs to another user, or others may write in it",
                help="remove it, or write elsewhere with -o",
            )

    def __contains__(self, key: str) -> bool:
        try:
            status = os.stat(f"{key}.arrow", dir_fd=self._fd, follow_symlinks=False)
        except OSError:
            return False
        return stat.S_ISREG(status.st_mode)

    def keep(self, key: str, data: bytes) -> None:
        """Store `data` under the name `key`, whole or not at all.

        Raises:
            MthpError: it cannot be written.
        """
        with writing(self._path / f"{key}.arrow"):
            temporary = f"{key}.tmp"
            with contextlib.suppress(FileNotFoundError):
                # Left by a run that was killed.
                os.unlink(temporary, dir_fd=self._fd)
            with open(self._open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as file:
                file.write(data)
            os.rename(temporary, f"{key}.arrow", src_dir_fd=self._fd, dst_dir_fd=self._fd)

    def read(self, key: str) -> bytes:
        """Return the data stored under the name `key`.

        Raises:
            OSError: it cannot be read.
        """
        with open(self._open(f"{key}.arrow", os.O_RDONLY), "rb") as file:
            return file.read()

    def drop(self, key: str) -> None:
        """Remove the data stored under the name `key`."""
        with contextlib.suppress(OSError):
            os.unlink(f"{key}.arrow", dir_fd=self._fd)

    def remove(self) -> None:
        """Remove the files that sweeps made, and the directory if nothing else is in it."""
        for name in os.listdir(self._fd):  # noqa: PTH208 - of an open directory
            # Nothing else, because the directory may be one of the user that has this name by chance.
            if _OURS.fullmatch(name):
                with contextlib.suppress(OSError):
                    os.unlink(name, dir_fd=self._fd)
        with contextlib.suppress(OSError):
            # It stays if other files are in it.
            self._path.rmdir()

    def _open(self, name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._fd)

    def close(self) -> None:
        """Close the directory. Closing twice does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
