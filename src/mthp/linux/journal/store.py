"""The file of the journal of switches, and its lock: format, durability and exclusion of other processes.

:mod:`mthp.linux.journal.switches` explains its purpose.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import stat
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mthp.bounded import parse_json
from mthp.errors import MthpError, NotPermittedError, UnsupportedError
from mthp.linux.journal.instance import INSTANCE, NONE
from mthp.tunables import SIZE_WORDS

LOCK_NAME = "switches.lock"
JOURNAL_NAME = "switches.journal"

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_LOCK_PAUSE = 0.001
_SWITCH = re.compile(r"hugepages-\d+kB/enabled")
_NUMBER = re.compile(r"khugepaged/(pages_to_scan|scan_sleep_millisecs|max_ptes_none)")


def default_root() -> Path:
    """Return the directory of the journal: ``/run/mthp`` for root, else one in the user's runtime directory.

    The environment variable MTHP_RUN_DIR names another directory. Windows of two directories do not wait for each
    other, so it is for tests, which hold the usual directory themselves, and for machines without either.

    Raises:
        UnsupportedError: there is no runtime directory.
    """
    if chosen := os.environ.get("MTHP_RUN_DIR"):
        return Path(chosen)
    if os.geteuid() == 0:
        return Path("/run/mthp")
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}")
    if not runtime.is_dir():
        raise UnsupportedError(
            f"runtime directory {runtime} does not exist", help="log in with a session manager, or set XDG_RUNTIME_DIR"
        )
    return runtime / "mthp"


def all_roots() -> tuple[Path, ...]:
    """Return the directories of all journals of this user: :func:`default_root`, and below it that of DAMON.

    A window for measuring accesses takes seconds, and must not delay changes of switches.
    """
    return default_root(), default_root() / INSTANCE


def has_entries(root: Path) -> bool:
    """Return whether a window is open, or a run died in one. It costs one stat(2)."""
    try:
        return (root / JOURNAL_NAME).stat().st_size > 0
    except OSError:
        return False


def boot_id() -> str:
    """Return the ID of this boot of the machine."""
    return _BOOT_ID.read_text().strip()


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the journal: a change of a switch.

    Attributes:
        switch: path below the THP directory, such as ``"hugepages-64kB/enabled"``, or
            :data:`~mthp.linux.journal.instance.INSTANCE`.
        was: the word before the change.
        ours: the word that was written.
        boot: ID of the boot in which it was written.
        owner: the process of the window, as :func:`owner_of` writes it, and behind another colon the number of the
            window in that process; ``""`` in entries of earlier versions.
        kept: whether it lasts until its owner ends, outside of windows.
    """

    switch: str
    was: str
    ours: str
    boot: str
    owner: str = ""
    kept: bool = False

    @property
    def holds(self) -> bool:
        """Return whether it is kept by a process that still runs."""
        return self.kept and is_alive(self.owner)

    @classmethod
    def parse(cls, line: bytes) -> Change | None:
        """Read a line of the journal; None if it is not one."""
        try:
            data = parse_json(line)
            # Only names and words of switches are accepted: a forged journal can do no more than choose among these.
            change = cls(data["switch"], data["was"], data["ours"], data["boot"])
            change = dataclasses.replace(change, owner=str(data.get("owner", "")), kept=data.get("kept") is True)
            words = (change.was, change.ours)
            if change.switch == INSTANCE:
                return change if change.was == NONE and change.ours.isdecimal() else None
            if _SWITCH.fullmatch(change.switch):
                return change if all(word in SIZE_WORDS for word in words) else None
            numbers = _NUMBER.fullmatch(change.switch) and all(word.isdecimal() for word in words)
            return change if numbers else None
        except (ValueError, TypeError, KeyError):
            return None


def owner_of(pid: int) -> str:
    """Return an identity of the process `pid`, unique in this boot: its PID and its start in clock ticks."""
    # The name in parentheses may contain any character; the start is the 20th field behind it (proc_pid_stat(5)).
    return f"{pid}:{stat_of(pid).split()[19]}"


def stat_of(pid: int) -> str:
    """Return the fields of /proc/PID/stat behind the name; the first one is the state.

    Raises:
        OSError: there is no such process, or no /proc.
    """
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2]


def is_alive(owner: str) -> bool:
    """Return whether the process of an entry still runs; a zombie does not."""
    pid, _, rest = owner.partition(":")
    try:
        fields = stat_of(int(pid)).split()
    except (OSError, ValueError):
        return False
    # With another start time the PID belongs to another process by now.
    return fields[0] not in ("Z", "X") and rest.partition(":")[0] == fields[19]


class JournalFiles:
    """The journal and its lock in an open directory.

    An entry reaches the disk before its switch is touched. The removal of an entry need not reach it, because after a
    power failure old entries belong to an earlier boot.
    """

    def __init__(self, root: Path, *, create: bool) -> None:
        self._root = root
        self._fds: list[int] = []
        _open_files.add(self)
        try:
            if create:
                with contextlib.suppress(FileExistsError):
                    root.mkdir(0o700, parents=True)
            # Files are opened relative to the checked directory, never through a symbolic link: root writes to them.
            self._directory = self._keep(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC))
            status = os.fstat(self._directory)
            # Another user could exchange the journal, and so have root set switches.
            if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise NotPermittedError(
                    f"{root} belongs to another user, or others may write in it",
                    help="remove it, or change its owner to this user and its mode to 0700",
                )
            self._lock = self._keep(self._open(LOCK_NAME))
            self._journal = self._keep(self._open(JOURNAL_NAME))
        except OSError as error:
            self.close()
            raise NotPermittedError(
                f"the journal in {root} cannot be used: {error.strerror}",
                help="it must be a directory of this user, in which no other user may write",
            ) from error
        except MthpError:
            self.close()
            raise

    def _keep(self, fd: int) -> int:
        self._fds.append(fd)
        return fd

    def _open(self, name: str) -> int:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, f"{name} is not a regular file")
        return fd

    def lock(self, timeout: float) -> None:
        """Wait until no other process is in a window.

        Raises:
            MthpError: another one is still in a window after `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while not self.try_lock():
            if time.monotonic() >= deadline:
                raise MthpError(
                    f"another process has held {self._root / LOCK_NAME} for {timeout:g} s",
                    help=f"another mthp is at work; find it with: fuser {self._root / LOCK_NAME}",
                )
            time.sleep(_LOCK_PAUSE)

    def try_lock(self) -> bool:
        """Take the lock if no process has it, and return whether this one has it now."""
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self) -> None:
        """Release the lock."""
        fcntl.flock(self._lock, fcntl.LOCK_UN)

    @property
    def identity(self) -> tuple[int, int]:
        """Return an identity that differs from that of a journal in a directory that was removed and made again."""
        status = os.fstat(self._journal)
        return status.st_dev, status.st_ino

    @property
    def empty(self) -> bool:
        """Return whether there are no entries. It costs one fstat(2)."""
        return os.fstat(self._journal).st_size == 0

    def read(self) -> list[Change]:
        """Return the complete entries, in the order in which they were written."""
        return [change for line in self._lines() if (change := Change.parse(line))]

    def write(self, changes: Sequence[Change]) -> None:
        """Replace the entries by `changes`: some of them, in their order, and then new ones; sync what is new.

        If this is interrupted, all remaining entries are true.

        Raises:
            MthpError: there is no room for them.
        """
        kept, size = self._keep_only(changes)
        text = b"".join(json.dumps(dataclasses.asdict(change)).encode() + b"\n" for change in changes[kept:])
        if not text:
            return
        try:
            # On a full disk a part may be written, which is an incomplete entry.
            if os.pwrite(self._journal, text, size) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._journal)
        except OSError as error:
            os.ftruncate(self._journal, size)
            raise MthpError(
                f"the journal in {self._root} cannot be written: {error.strerror}",
                help="free space there: switches are changed only after the journal is written",
            ) from error

    def _keep_only(self, changes: Sequence[Change]) -> tuple[int, int]:
        """Remove the entries that are not in `changes`; return the number of those that are, and the file's size."""
        kept = at = size = 0
        removed: list[tuple[int, int]] = []
        for line in self._lines():
            if kept < len(changes) and Change.parse(line) == changes[kept]:
                kept, size = kept + 1, at + len(line) + 1
            else:
                removed.append((at, len(line)))
            at += len(line) + 1
        for begin, length in removed:
            # Overwritten in its place, because entries behind it must not be missing for a moment.
            if begin < size:
                os.pwrite(self._journal, b" " * length, begin)
        os.ftruncate(self._journal, size)
        return kept, size

    def _lines(self) -> list[bytes]:
        size = os.fstat(self._journal).st_size
        # Text behind the last newline is an incomplete entry.
        return os.pread(self._journal, size, 0).split(b"\n")[:-1]

    def close(self) -> None:
        """Close all files, and so release the lock. Closing twice does nothing."""
        while self._fds:
            os.close(self._fds.pop())


_open_files: weakref.WeakSet[JournalFiles] = weakref.WeakSet()


def _close_in_child() -> None:
    for files in list(_open_files):
        files.close()


# A lock of flock(2) belongs to the open file, which a child shares: it would keep the lock after its parent's death.
os.register_at_fork(after_in_child=_close_in_child)
