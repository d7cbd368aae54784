"""Create output files, for every command and function that writes one.

A file appears under its name whole, or not at all. It is written without a name (O_TMPFILE) or, on file systems
without such files, under a hidden temporary one, and gets its name when it is finished. So an error, a full disk or
kill -9 leaves nothing; only on a file system without O_TMPFILE, kill -9 leaves a file called ``.mthp-*.tmp``.

Other users may write in the directory, such as /tmp. So a name that is a symbolic link is never followed: without
`overwrite` it counts as taken, with it the link is replaced, and its destination stays unchanged. All steps use the
directory descriptor that was opened first.
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
"""Mode of files that show the memory layout of a live process, as that of ``perf.data``."""

PUBLIC = 0o666
"""Mode of all others, less the umask."""

_NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)
"""Errors of open(2) if the file system or kernel has no O_TMPFILE (its "BUGS"); ENOENT comes from FUSE."""

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK)
"""Errors of link(2) on FAT and some network file systems, which have no hard links."""


def check_output(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Check, before long work, that a file may be created at `path`.

    Raises:
        UsageError: the name exists, or the directory does not.
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
    """Yield a file to write, which gets the name `path` at the end of the block, or vanishes after an exception.

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
            # Closing writes the buffer, which fails again on a full disk, after the error that is already raised.
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
    """A file without a buffer: written bytes are in the kernel, and stay when this process is killed.

    A nearly full disk accepts a part of a write, which Arrow does not notice. So this class writes the rest, too, and
    either all is written or an error is raised.
    """

    def write(self, data: Any, /) -> int:
        rest = memoryview(data).cast("B")
        while len(rest):
            rest = rest[super().write(rest) :]
        return memoryview(data).nbytes


class NewFile(Closing):
    """A file that has no name yet. A context manager that leaves nothing behind without :meth:`publish`.

    Args:
        path: the name that it will have.
        overwrite: replace a regular file or a symbolic link of that name.
        mode: permissions, less the umask. A file that is replaced never becomes readable to more users.

    Attributes:
        raw: file to write to, without a buffer.

    Raises:
        UsageError: the name exists, or the directory does not exist or takes no files.
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
            raise UsageError(f"{self._path!r} cannot be created: directory {directory} does not exist") from error
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
        """Check that the name is free or may be replaced at this moment."""
        try:
            there = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(there.st_mode) and not stat.S_ISLNK(there.st_mode):
            raise UsageError(f"{self._path} is not a regular file", help="name a file that does not exist yet")
        if not self._overwrite:
            raise self._taken()
        if stat.S_ISREG(there.st_mode):
            # A file that its owner closed to others must not open up because its contents were replaced.
            self._mode &= there.st_mode | PRIVATE

    def _taken(self) -> UsageError:
        return UsageError(f"{self._path} exists already", help="use --force to replace it, or another name")

    def _unnamed(self) -> int:
        flags = os.O_WRONLY | os.O_CLOEXEC
        try:
            # In a bare chroot without /proc, the file could not be named later.
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
        """Link the file to its name; writing may continue.

        Raises:
            UsageError: the name was taken in the meantime, without `overwrite`.
            MthpError: the file cannot be synced or named.
        """
        with writing(self._path):
            os.fchmod(self.raw.fileno(), self._mode)
            # The name must not reach the disk before the contents, or a crash leaves an empty file under it.
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
        # rename(2) replaces a link itself, not what it points to.
        os.rename(self._temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        self._temporary = ""

    def _link(self, name: str) -> None:
        if not self._temporary:
            # With a dst_dir_fd Python calls linkat(2) with AT_SYMLINK_FOLLOW, which can name an O_TMPFILE file.
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
        """Close the file, and remove it if it was not published. Closing twice does nothing."""
        self.raw.close()
        if self._temporary:
            with contextlib.suppress(OSError):
                os.unlink(self._temporary, dir_fd=self._directory)
            self._temporary = ""
        if self._directory >= 0:
            os.close(self._directory)
            self._directory = -1


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open the regular file at `path` for reading; refuse anything else without blocking, as a FIFO would.

    Raises:
        UsageError: the file is not regular.
        OSError: the file cannot be opened.
    """
    # Without O_NONBLOCK, opening a FIFO waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UsageError(f"{os.fspath(path)} is not a regular file")
    return open(descriptor, "rb")


def begins(path: str | os.PathLike[str], size: int) -> bytes:
    """Return the first `size` bytes of a regular file; ``b""`` if it is not regular or cannot be read."""
    try:
        with open_regular(path) as file:
            return file.read(size)
    except (OSError, ValueError):
        return b""


def _umask() -> int:
    """Return this process's umask, from its status, because umask(2) always sets it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_bytes().split(b"\n"):
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    value = os.umask(0o077)
    os.umask(value)
    return value
