"""What can go wrong, as exceptions that carry their own help.

Every exception that a person may see derives from :class:`MthpError`. Its text names the value and what is
allowed, its ``help`` says what to do about it, and its ``exit_code`` is the one of the command line's contract:

====  =========================================================
 1    some of it could not be done
 2    wrong usage: a bad value, an unknown name, a foreign file
 3    not permitted, or not supported here
 4    the target vanished
====  =========================================================

Whatever looks into a process may raise TargetVanishedError and NotPermittedError, and what reads or writes Parquet
UnsupportedError without pyarrow: docstrings name what is raised beside that.

What happens to a PTE or a range while it is worked on is not an exception but a
:class:`~mthp.results.ScanResult`.
"""

from __future__ import annotations

from typing import ClassVar


class MthpError(Exception):
    """Base of all errors of this package.

    Args:
        message: one sentence that names the value and what is wrong with it.
        help: what the person can do about it, or ``""``.
    """

    JSON: ClassVar = "message help exit_code"

    message: str
    help: str
    exit_code: int = 1

    def __init__(self, message: str, *, help: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.help = help


class UsageError(MthpError, ValueError):
    """A value, name, size, order, limit or file that cannot be used as given."""

    exit_code = 2


class NotPermittedError(MthpError):
    """The kernel refuses this to these rights; ``help`` names the capability or sysctl that is missing."""

    exit_code = 3


class UnsupportedError(MthpError):
    """This kernel, machine or installation cannot do it; ``help`` says what would make it so."""

    exit_code = 3


class TargetVanishedError(MthpError):
    """The target process is gone: it exited, or never was."""

    exit_code = 4
