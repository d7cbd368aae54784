"""mthp's instance of DAMON as one switch of the journal: its word is ``0`` without one, otherwise the instance's mark.

Only the program that made a kdamond may stop it, but sysfs has no place for a name. So the instance is marked by a
number in its update interval. An instance with another number belongs to another program, and is not touched.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from pathlib import Path

from mthp.errors import MthpError, NotPermittedError, UnsupportedError
from mthp.linux.kernelfiles import text_of

INSTANCE = "damon"
"""The switch's name in the journal."""

NONE = "0"
"""Its word without an instance."""

TAKEN = "taken"
"""Its word with an instance of another program."""

BUSY_SECONDS = 2.0
"""Seconds for which a write is repeated: the kernel refuses it while another process reads or writes any file of DAMON
(nr_kdamonds_store() and state_store(), mm/damon/sysfs.c, only try their lock)."""

# The kernel does not read it where the monitored addresses are fixed: fvaddr and paddr have no update
# (damon_va_initcall() and damon_pa_initcall(), mm/damon/vaddr.c and paddr.c).
_MARK = "0/contexts/0/monitoring_attrs/intervals/update_us"
_TARGETS = "0/contexts/0/targets/nr_targets"

_UNMARKED = "60000000"
"""The update interval of a new context (damon_sysfs_attrs_add_dirs(), mm/damon/sysfs.c)."""


def kdamonds_of(sysfs: Path) -> Path:
    """Return the directory of the kdamonds.

    Args:
        sysfs: the THP directory; that of DAMON is its sibling.
    """
    return sysfs.parent / "damon" / "admin" / "kdamonds"


def read_instance(kdamonds: Path) -> str | None:
    """Return the word of the switch; None without DAMON, or without the right to read it."""
    number = text_of(kdamonds / "nr_kdamonds")
    if number in (None, NONE):
        return number
    mark = text_of(kdamonds / _MARK)
    if number != "1":
        return TAKEN
    unused = mark is None or (mark == _UNMARKED and text_of(kdamonds / _TARGETS) == NONE)
    if unused and text_of(kdamonds / "0/state") == "off":
        # Without a context, or with one that has no target: its program died between two writes.
        return NONE
    # Another program may have set its interval to 0, which must not pass for the word without an instance.
    return TAKEN if mark in (None, NONE) else mark


def write_instance(kdamonds: Path, word: str) -> None:
    """Make an instance with the mark `word`, not running yet; or, for ``0``, end the present one.

    Raises:
        NotPermittedError: these rights are not sufficient.
        UnsupportedError: there is an instance already.
        MthpError: the kernel refuses.
    """
    if word == NONE:
        # The kernel refuses it for an instance that never ran, or has a target that exited.
        with contextlib.suppress(OSError):
            write_file(kdamonds / "0/state", "off")
        write_setting(kdamonds / "nr_kdamonds", NONE)
        return
    if read_instance(kdamonds) != NONE:
        raise UnsupportedError("DAMON is in use by another program", help="wait until that has ended")
    write_setting(kdamonds / "nr_kdamonds", "1")
    write_setting(kdamonds / "0/contexts/nr_contexts", "1")
    # The mark comes last: until then the instance has no target, and counts as unused if this process dies.
    write_setting(kdamonds / _MARK, word)


def write_file(path: Path, text: str) -> None:
    """Write a file of sysfs, again while it is busy, as DAMON's may be; raise OSError if the kernel refuses it."""
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
    """Write a file of sysfs, as :func:`write_file` does.

    Raises:
        NotPermittedError: these rights are not sufficient.
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
