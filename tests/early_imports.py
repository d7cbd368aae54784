"""Import modules before a process drops its rights, for tests in which it becomes the user ``nobody``.

The checkout, its virtual environment and the interpreter may lie below a directory that other users cannot enter, such
as ``/root``. A module that such a process imports late is then missing.
"""

from __future__ import annotations

import contextlib
import importlib
import pkgutil

import mthp

LATE = ("numpy.ma", "encodings.idna", "rich.traceback")
"""Modules that libraries import when they are first needed."""


def import_all() -> None:
    """Import every module of mthp, and modules that libraries import late. Missing extras are skipped."""
    names = [module.name for module in pkgutil.walk_packages(mthp.__path__, "mthp.", onerror=lambda name: None)]
    for name in (*names, *LATE):
        if not name.endswith("__main__"):
            with contextlib.suppress(ImportError, mthp.MthpError):
                importlib.import_module(name)
