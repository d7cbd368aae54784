"""The seam on a file: a snapshot, stored as Parquet, or a recording of many steps, an Arrow stream."""

from mthp.snapshot.description import SnapshotInfo
from mthp.snapshot.load import SnapshotSpace, info, load
from mthp.snapshot.open import open_file
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
