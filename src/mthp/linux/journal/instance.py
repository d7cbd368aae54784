"""Our instance of DAMON, as one switch of the journal: its word is ``0`` without one, and its mark while it is there.

Who may stop a kdamond is a question of whose it is, and sysfs has no place for a name. So the instance is marked by a
number in its update interval, which nothing reads where the addresses that are monitored are fixed
(damon_va_operations_init() and damon_pa_initcall(), mm/damon/vaddr.c and paddr.c: fvaddr and paddr have no update). An
instance with another number is another program's, and is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

from mthp.errors import MthpError, NotPermittedError, UnsupportedError

INSTANCE = "damon"
"""The switch's name in the journal."""

NONE = "0"
"""Its word without an instance."""

TAKEN = "taken"
"""Its word with an instance of another program."""

BUSY_SECONDS = 2.0
"""How long a write is tried again: the kernel refuses it while another process reads or writes any file of DAMON's
(nr_kdamonds_store() and state_store(), mm/damon/sysfs.c, only try their lock)."""

_MARK = "0/contexts/0/monitoring_attrs/intervals/update_us"
_TARGETS = "0/contexts/0/targets/nr_targets"

_UNMARKED = "60000000"
"""The update interval of a context that was just made (damon_sysfs_attrs_add_dirs(), mm/damon/sysfs.c)."""


def kdamonds_of(sysfs: Path) -> Path:
    """Return the directory of the kdamonds.

    Args:
        sysfs: the THP directory, which is beside that of DAMON.
    """
    return sysfs.parent / "damon" / "admin" / "kdamonds"


def read_instance(kdamonds: Path) -> str | None:
    """Return the word of the switch; None without DAMON, or without the right to read it."""
    number = _text(kdamonds / "nr_kdamonds")
    if number in (None, NONE):
        return number
    mark = _text(kdamonds / _MARK)
    if number != "1":
        return TAKEN
    unused = mark is None or (mark == _UNMARKED and _text(kdamonds / _TARGETS) == NONE)
    if unused and _text(kdamonds / "0/state") == "off":
        # Without a context, or with one that has no target: its program died between two writes.
        return NONE
    # Another program may have set its interval to 0, which is not our word for no instance.
    return TAKEN if mark in (None, NONE) else mark


def write_instance(kdamonds: Path, word: str) -> None:
    """Make an instance with the mark `word`, not running yet; or, for ``0``, end the one that is there.

    Raises:
        NotPermittedError: these rights do not suffice.
        UnsupportedError: there is an instance already.
        MthpError: the kernel refuses.
    """
    if word == NONE:
        # One that never ran, or whose target exited, refuses that.
        with contextlib.suppress(OSError):
            write_file(kdamonds / "0/state", "off")
        write_setting(kdamonds / "nr_kdamonds", NONE)
        return
    if read_instance(kdamonds) != NONE:
        raise UnsupportedError("DAMON is in use by another program", help="wait until that has ended")
    write_setting(kdamonds / "nr_kdamonds", "1")
    write_setting(kdamonds / "0/contexts/nr_contexts", "1")
    write_setting(kdamonds / _MARK, word)


def write_file(path: Path, text: str) -> None:
    """Write a file of sysfs, again while it is busy, as DAMON's may be.

    Raises:
        OSError: the kernel refuses it.
    """
    begin = time.monotonic()
    while True:
        try:
            fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() - begin > BUSY_SECONDS:
                raise
            time.sleep(0.01)
        else:
            return


def write_setting(path: Path, text: str) -> None:
    """Write a file of sysfs, as :func:`write_file`.

    Raises:
        NotPermittedError: these rights do not suffice.
        MthpError: the kernel refuses it.
    """
    try:
        write_file(path, text)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise NotPermittedError(
                f"{path} may not be written: {error.strerror}", help="run as root, with /sys mounted read-write"
            ) from error
        raise MthpError(f"{path}: {error.strerror}") from error


def _text(path: Path) -> str | None:
    try:
        return path.read_text().rstrip("\n")
    except OSError:
        return None
