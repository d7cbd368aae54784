"""Errors, as exceptions that carry their own help.

Every exception for the user derives from :class:`MthpError`. Its text names the value and what is allowed, its
``help`` is the remedy, and its ``exit_code`` follows the contract of the command line:

====  =========================================================
 1    some of it could not be done
 2    wrong usage: a bad value, an unknown name, a foreign file
 3    not permitted, or not supported here
 4    the target vanished
====  =========================================================

Every function that reads a process may raise TargetVanishedError and NotPermittedError, and every reader and writer of
Parquet UnsupportedError without pyarrow. Docstrings name the others.

The failure of a PTE or a range while it is worked on is a :class:`~mthp.results.ScanResult`, not an exception.
"""

from __future__ import annotations

from typing import ClassVar


class MthpError(Exception):
    """Base of all errors of this package.

    Args:
        message: one sentence that names the value and what is wrong with it.
        help: the remedy, or ``""``.
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
    """A value, name, size, order, limit or file that cannot be used."""

    exit_code = 2


class NotPermittedError(MthpError):
    """The rights do not suffice for the kernel; ``help`` names the missing capability or sysctl."""

    exit_code = 3


class UnsupportedError(MthpError):
    """This kernel, machine or installation cannot do it; ``help`` names what it would take."""

    exit_code = 3


class TargetVanishedError(MthpError):
    """The target process is gone: it exited, or never existed."""

    exit_code = 4
