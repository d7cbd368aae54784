"""Choose the format of a file: of a new file by its name, of an existing one by its first bytes."""

from __future__ import annotations

import os
from typing import BinaryIO

from mthp.files import begins, check_output
from mthp.snapshot.description import Description
from mthp.snapshot.plain import PlainRunReader, PlainRunWriter, PlainStreamReader, PlainStreamWriter, is_plain
from mthp.snapshot.stream import PLAIN_STEPS, StreamReader, StreamWriter
from mthp.snapshot.table import PLAIN_RUNS, RunReader, RunWriter, pyarrow


def check_new(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Check, before long work, that a file of this name can be written.

    Raises:
        UnsupportedError: it needs pyarrow, which is not installed.
        UsageError: as :func:`mthp.files.check_output`.
    """
    if not is_plain(path):
        pyarrow()
    check_output(path, overwrite=overwrite)


def run_writer(file: BinaryIO, path: str | os.PathLike[str], page_size: int) -> RunWriter:
    """Return a writer of the runs of a snapshot into `file`."""
    return (PlainRunWriter if is_plain(path) else RunWriter)(file, os.fspath(path), page_size)


def run_reader(path: str | os.PathLike[str]) -> RunReader:
    """Open the snapshot at `path`.

    Raises:
        UsageError, UnsupportedError: see :class:`RunReader`.
    """
    return (PlainRunReader if begins(path, len(PLAIN_RUNS)) == PLAIN_RUNS else RunReader)(path)


def stream_writer(path: str | os.PathLike[str], description: Description, *, overwrite: bool) -> StreamWriter:
    """Return a writer of a recording to `path`.

    Raises:
        UsageError, UnsupportedError: see :class:`StreamWriter`.
    """
    return (PlainStreamWriter if is_plain(path) else StreamWriter)(path, description, overwrite=overwrite)


def stream_reader(path: str | os.PathLike[str]) -> StreamReader:
    """Open the recording at `path`.

    Raises:
        UsageError, UnsupportedError: see :class:`StreamReader`.
    """
    return (PlainStreamReader if begins(path, len(PLAIN_STEPS)) == PLAIN_STEPS else StreamReader)(path)
