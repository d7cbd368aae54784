"""The seam on a file: a recorded address space, stored as Parquet."""

from mthp.snapshot.description import SnapshotInfo
from mthp.snapshot.load import SnapshotSpace, info, load
from mthp.snapshot.open import open_file
from mthp.snapshot.record import record

__all__ = ["SnapshotInfo", "SnapshotSpace", "info", "load", "open_file", "record"]
