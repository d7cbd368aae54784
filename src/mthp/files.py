"""Create output files: for every command and function that writes one, whatever is in it.

A file appears under exactly the name that was given, whole, or not at all. It is written without a name (O_TMPFILE)
or, where the file system has no such files, under a hidden temporary one, and takes its name when it is finished. So
an error, a full disk or kill -9 leaves nothing; only on a file system without O_TMPFILE, kill -9 leaves a file called
``.mthp-*.tmp``.

The directory may be one in which other users write, such as /tmp. So the name is never followed if it is a symbolic
link: without `overwrite` it counts as taken, with it the link is replaced, and what it points to stays as it is. All
steps use the directory as it was opened in the beginning.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mthp.closing import Closing
from mthp.errors import MthpError, UsageError

PRIVATE = 0o600
"""Mode of files that show where a live process keeps what, as that of ``perf.data``."""

PUBLIC = 0o666
"""Mode of all others; the umask takes its part of it."""

_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
"""What open(2) says where file system or kernel have no O_TMPFILE ("BUGS" there); ENOENT by FUSE."""

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""What link(2) says on FAT and some network file systems, which have no hard links."""


def check_output(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Check, before long work, that a file may be created at `path`.

    Raises:
        UsageError: something is there already, or the directory is not.
    """
    with NewFile(path, overwrite=overwrite):
        pass


def write_whole(path: str | os.PathLike[str], data: bytes, *, overwrite: bool = False, mode: int = PUBLIC) -> None:
    """Create the file `path` with the contents `data`.

    Raises:
        UsageError, MthpError: as :class:`NewFile`.
    """
    with creating(path, overwrite=overwrite, mode=mode) as file:
        file.write(data)


@contextlib.contextmanager
def creating(path: str | os.PathLike[str], *, overwrite: bool = False, mode: int = PRIVATE) -> Iterator[BinaryIO]:
    """Yield a file to write, which takes the name `path` at the end of the block, and none after an exception.

    Raises:
        UsageError, MthpError: as :class:`NewFile`.
    """
    with NewFile(path, overwrite=overwrite, mode=mode) as new:
        file = io.BufferedWriter(new.raw)
        try:
            with writing(path):
                yield file
                file.flush()
            new.publish()
        finally:
            # Closing writes what is buffered, which fails again on a full disk; the error is known already.
            with contextlib.suppress(OSError):
                file.close()


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn an OSError of the block into an :class:`~mthp.errors.MthpError` that names `path`."""
    try:
        yield
    except OSError as error:
        raise MthpError(f"{os.fspath(path)}: cannot be written: {error.strerror or error}") from error


class _WholeWrites(io.FileIO):
    """A file without a buffer: what was written is the kernel's, and stays when this process is killed.

    A disk that is nearly full takes a part of what is written, which Arrow does not notice; here the rest is tried
    again, and so either written or an error.
    """

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        while len(rest):
            rest = rest[super().write(rest) :]
        return memoryview(data).nbytes


class NewFile(Closing):
    """A file that has no name yet. A context manager: leaving it without :meth:`publish` leaves nothing.

    Args:
        path: the name that it will have.
        overwrite: replace a regular file or a symbolic link of that name.
        mode: permissions, of which the umask takes its part. A file that is replaced never becomes readable to more.

    Attributes:
        raw: to write to, without a buffer.

    Raises:
        UsageError: something of that name is there, or the directory is not or takes no files.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, mode: int = PRIVATE) -> None:
        self._path = os.fspath(path)
        self._overwrite = overwrite
        self._mode = mode & ~_umask()
        self._temporary = ""
        self._published = False
        directory, self._name = os.path.split(self._path)
        try:
            if self._name in ("", ".", ".."):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
            flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
            self._directory = os.open(directory or ".", flags)
        except FileNotFoundError as error:
            raise UsageError(f"{self._path!r} cannot be created: there is no directory {directory}") from error
        except (OSError, ValueError) as error:
            raise self._impossible(error) from error
        try:
            self._check_name()
            self.raw = _WholeWrites(self._unnamed(), "wb")
        except BaseException as error:
            os.close(self._directory)
            if isinstance(error, OSError | ValueError) and not isinstance(error, MthpError):
                raise self._impossible(error) from error
            raise

    def _impossible(self, error: Exception) -> UsageError:
        return UsageError(f"{self._path!r} cannot be created: {getattr(error, 'strerror', None) or error}")

    def _check_name(self) -> None:
        """Check what has the name at this moment."""
        try:
            there = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(there.st_mode) and not stat.S_ISLNK(there.st_mode):
            raise UsageError(f"{self._path} is not a regular file", help="name a file that does not exist yet")
        if not self._overwrite:
            raise self._taken()
        if stat.S_ISREG(there.st_mode):
            self._mode &= there.st_mode | PRIVATE

    def _taken(self) -> UsageError:
        return UsageError(f"{self._path} exists already", help="use --force to replace it, or another name")

    def _unnamed(self) -> int:
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            # Without /proc, as in a bare chroot, it could not be named later.
            if os.path.exists("/proc/self/fd"):  # noqa: PTH110 - as everything here, without path objects
                return os.open(".", flags | os.O_TMPFILE, PRIVATE, dir_fd=self._directory)
        except OSError as error:
            if error.errno not in _NO_TMPFILE:
                raise
        name = f".mthp-{os.urandom(8).hex()}.tmp"
        descriptor = os.open(name, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, PRIVATE, dir_fd=self._directory)
        self._temporary = name
        return descriptor

    def publish(self) -> None:
        """Give the file its name; writing may go on.

        Raises:
            UsageError: without `overwrite`, something has that name by now.
            MthpError: it cannot be synced or named.
        """
        with writing(self._path):
            os.fchmod(self.raw.fileno(), self._mode)
            os.fsync(self.raw.fileno())
            try:
                self._replace() if self._overwrite else self._link(self._name)
            except FileExistsError as error:
                raise self._taken() from error
            except IsADirectoryError as error:
                raise UsageError(f"{self._path} is not a regular file") from error
        self._published = True

    def _replace(self) -> None:
        if not self._temporary:
            name = f".mthp-{os.urandom(8).hex()}.tmp"
            self._link(name)
            self._temporary = name
        os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._temporary = ""

    def _link(self, name: str) -> None:
        if not self._temporary:
            # With a dst_dir_fd Python calls linkat(2) with AT_SYMLINK_FOLLOW, which names a file of O_TMPFILE.
            os.link(f"/proc/self/fd/{self.raw.fileno()}", name, dst_dir_fd=self._directory)
            return
        try:
            os.link(self._temporary, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            # An empty file claims the name first.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            os.close(os.open(name, flags, PRIVATE, dir_fd=self._directory))
            os.rename(self._temporary, name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            self._temporary = ""

    def close(self) -> None:
        """Close it. What was not published is gone. Closing twice does nothing."""
        self.raw.close()
        if self._temporary:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._directory)
            self._temporary = ""
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open the regular file at `path` for reading; anything else is refused without waiting for it, as a FIFO would.

    Raises:
        UsageError: it is not a regular file.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"{os.fspath(path)} is not a regular file")
    return open(descriptor, "rb")


def begins(path: str | os.PathLike[str], size: int) -> bytes:
    """Return the first `size` bytes of a regular file; ``b""`` of anything else, and of what cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(size)
    except (OSError, ValueError):
        return b""


def _umask() -> int:
    """Return this process's umask; Linux has no call that does not set it, so its own status is read."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_bytes().split(b"\n"):
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    value = os.umask(0o077)
    os.umask(value)
    return value
