"""Snapshots and recordings: the seam on a file.

A snapshot is a Parquet file, a recording of many steps is an Arrow stream, and both can be plain files. The package can
be called, because it has the name of a verb: ``mthp.snapshot(target, path)`` takes a snapshot.
"""

import importlib
import sys
import types
from typing import Any

from mthp.snapshot.description import SnapshotInfo
from mthp.snapshot.load import SnapshotSpace, info, load, open_file
from mthp.snapshot.record import record
from mthp.snapshot.recorder import Pace, Recorded, record_series
from mthp.snapshot.recording import Recording

__all__ = [
    "Pace",
    "Recorded",
    "Recording",
    "SnapshotInfo",
    "SnapshotSpace",
    "info",
    "load",
    "open_file",
    "record",
    "record_series",
]


class _Verb(types.ModuleType):
    """This package as a callable."""

    def __call__(self, *arguments: Any, **options: Any) -> SnapshotInfo:
        # By name, because this package must not import modules above the backends.
        taken: SnapshotInfo = importlib.import_module("mthp").take_snapshot(*arguments, **options)
        return taken


# A module is callable if its class is (special methods are looked up there). Type checkers do not accept it: typed
# programs call mthp.take_snapshot, which is the same.
sys.modules[__name__].__class__ = _Verb
