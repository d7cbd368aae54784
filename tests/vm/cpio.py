"""Archives of files in the one format that every kernel unpacks as its first file system: cpio, "newc".

The format is one header of ASCII hex numbers for each file, its name and its bytes, each padded to four bytes
(Documentation/driver-api/early-userspace/buffer-format.rst). Archives may follow one another.
"""

from __future__ import annotations

import stat
from pathlib import Path

_TRAILER = "TRAILER!!!"


class Archive:
    """An archive that grows in memory."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._inode = 0
        self._directories: set[str] = set()

    def directory(self, name: str) -> None:
        """A directory and those above it, once."""
        parent = str(Path(name).parent)
        if name in self._directories or name in {".", "/", ""}:
            return
        self.directory(parent)
        self._directories.add(name)
        self._add(name, stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, data: bytes, mode: int = 0o644) -> None:
        """A file with the bytes `data`."""
        self.directory(str(Path(name).parent))
        self._add(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """A symbolic link."""
        self.directory(str(Path(name).parent))
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def packed(self) -> bytes:
        """Return the archive."""
        return b"".join([*self._parts, _entry(_TRAILER, 0, 0, b"")])

    def _add(self, name: str, mode: int, data: bytes) -> None:
        self._inode += 1
        self._parts.append(_entry(name.lstrip("/"), self._inode, mode, data))


def _entry(name: str, inode: int, mode: int, data: bytes) -> bytes:
    encoded = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # magic; ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
