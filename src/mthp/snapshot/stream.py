"""The file of a recording: an Arrow IPC stream, readable up to its last whole batch.

In Arrow's stream format every record batch is independent, behind a header with its length: if the writer is killed, or
the disk is full, only the last batch is lost. Any Arrow library reads the file.

One batch is one step. Its rows are runs of pages (:mod:`mthp.snapshot.runs`), cut at the borders of PMD ranges:
``start`` is an address; the others are ``pages``, ``state`` and ``folio_order``. A step has all runs of each PMD range
that differs from the step before, and none of the others. A row with ``state`` 0 marks a range as empty.

The other data of a step are one JSON object in the batch's metadata, under :data:`KEY`: see
:mod:`mthp.snapshot.recording`. Its ``crc`` is that of the rows. The stream's schema has the description of the
recording under the same key, and the last batch an ``end``, so that a reader knows whether the file is complete.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from mthp.bounded import parse_json
from mthp.errors import MthpError, UsageError
from mthp.files import NewFile, begins, open_regular, writing
from mthp.snapshot.batches import check_message
from mthp.snapshot.description import ADDRESS_LIMIT, Description
from mthp.snapshot.runs import RunTable, checked_runs
from mthp.snapshot.table import pyarrow, reading

KEY = "mthp.recording"
MAGIC = b"\xff\xff\xff\xff"
"""First bytes of an Arrow stream: the mark before the length of its first message."""

PLAIN_STEPS = b"mthpstep"
"""First bytes of a plain recording (:mod:`mthp.snapshot.plain`)."""

COLUMNS = {"start": "uint64", "pages": "uint64", "state": "uint16", "folio_order": "int8"}
"""Columns of the table and their Arrow types."""

Meta = dict[str, Any]


def is_recording(path: str | os.PathLike[str]) -> bool:
    """Return whether the file at `path` begins as a recording does; False if it cannot be read."""
    return begins(path, len(PLAIN_STEPS)).startswith((MAGIC, PLAIN_STEPS))


class StreamWriter:
    """Writes a recording step by step. A context manager.

    A step is in the file when :meth:`add` returns. The file gets its name with the first step, so that only a readable
    file replaces an existing one.

    Args:
        path: path of a new file, readable by its owner only.
        overwrite: replace a regular file or a symbolic link of that name.

    Attributes:
        bytes: bytes written so far.
        steps: number of complete steps.

    Raises:
        UsageError: the file exists or cannot be created.
        MthpError: it cannot be written. No file is left.
    """

    def __init__(self, path: str | os.PathLike[str], description: Description, *, overwrite: bool = False) -> None:
        self.path = os.fspath(path)
        self.steps = 0
        self._page_size = description.geometry.page_size
        self._new = NewFile(path, overwrite=overwrite)
        try:
            with writing(self.path):
                self._begin(description)
        except BaseException:
            self._new.close()
            raise

    def _begin(self, description: Description) -> None:
        arrow = self._arrow = pyarrow()
        fields = [(name, getattr(arrow, kind)()) for name, kind in COLUMNS.items()]
        self._schema = arrow.schema(fields, metadata={KEY: description.to_json()})
        options = pyarrow("pyarrow.ipc").IpcWriteOptions(compression="zstd")
        # The unbuffered file: a step is in it when the write returns.
        self._writer = pyarrow("pyarrow.ipc").new_stream(self._new.raw, self._schema, options=options)

    def _write(self, runs: RunTable, meta: Meta) -> None:
        columns = (
            (runs.first * self._page_size).astype(np.uint64),
            runs.pages.astype(np.uint64),
            runs.state,
            runs.folio_order,
        )
        batch = self._arrow.record_batch([self._arrow.array(column) for column in columns], schema=self._schema)
        text = json.dumps(meta | {"crc": _crc(columns)}, separators=(",", ":"))
        self._writer.write_batch(batch, custom_metadata={KEY: text})

    def _close(self) -> None:
        # The steps are written already: this writes only the mark of the stream's end.
        with contextlib.suppress(OSError, ValueError):
            self._writer.close()

    def add(self, runs: RunTable, meta: Meta) -> None:
        """Append one step.

        Args:
            runs: runs in the form of the module's docstring; a run of state 0 empties its range.
            meta: other data of the step; JSON.

        Raises:
            MthpError: the file cannot be written. If this is the first step, no file is left.
        """
        try:
            with writing(self.path):
                self._write(runs, meta)
        except MthpError as error:
            if not self.steps:
                raise
            remedy = f"the steps recorded before can be read; steps: {self.steps}"
            raise MthpError(error.message, help=remedy) from error
        if not self.steps:
            # Before the first step the file is not readable.
            self._new.publish()
        self.steps += 1

    @property
    def bytes(self) -> int:
        """Size of the file so far."""
        return self._new.raw.tell()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        self._new.close()


def _crc(columns: tuple[np.ndarray[Any, Any], ...]) -> int:
    value = 0
    for column in columns:
        value = zlib.crc32(np.ascontiguousarray(column).data, value)
    return value


class StreamReader:
    """Reads a recording from its beginning.

    Attributes:
        description: description of the recording at its beginning.

    Raises:
        UsageError: missing, unreadable, not a recording, or of a newer version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        pyarrow("pyarrow.ipc")
        with self._opened() as (_, stream):
            metadata = stream.schema.metadata or {}
            with reading(self.path):
                self.description = Description.from_json(metadata[KEY.encode()])
                # After the description, whose version may explain other columns.
                if [(field.name, str(field.type)) for field in stream.schema] != list(COLUMNS.items()):
                    raise UsageError(f"damaged: its columns are not {', '.join(COLUMNS)}")

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[BinaryIO, Any]]:
        with contextlib.ExitStack() as stack:
            with reading(self.path):
                file = stack.enter_context(open_regular(self.path))
                # Arrow also reads the format before 0.15, which has no mark: any four bytes would be a length.
                if file.read(4) != MAGIC:
                    raise UsageError("not a recording", help=_MAKE_ONE)
                file.seek(0)
                check_message(file, len(COLUMNS))
                stream = stack.enter_context(pyarrow("pyarrow.ipc").open_stream(file))
                if KEY.encode() not in (stream.schema.metadata or {}):
                    raise UsageError("not a recording: an Arrow stream of something else", help=_MAKE_ONE)
            yield file, stream

    def steps(self) -> Iterator[tuple[Meta, RunTable]]:
        """Yield the steps up to the first incomplete one.

        Yields:
            The JSON object of a step, and its runs; their `vma` is not set. Where the file breaks off or is damaged,
            the object has only the key ``broken``, with the reason.
        """
        arrow = pyarrow()
        with self._opened() as (file, stream):
            while True:
                try:
                    check_message(file, len(COLUMNS))
                    batch, metadata = stream.read_next_batch_with_custom_metadata()
                    text = None if metadata is None else metadata.get(KEY.encode())
                    meta, runs = parse_json(text or "null"), self._runs(batch)
                    # Arrow's stream has no checksums of its own.
                    if not isinstance(meta, dict) or meta.get("crc") != self._checksum(batch):
                        raise ValueError("its checksum is wrong")
                except StopIteration:
                    return
                except UsageError as error:
                    # A file beyond a bound is not a truncated file: the reader must report it.
                    if error.help:
                        raise UsageError(f"{self.path}: {error.message}", help=error.help) from error
                    yield {"broken": error.message}, RunTable.joined([])
                    return
                except (OSError, ValueError, MemoryError, arrow.ArrowException) as error:
                    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    yield {"broken": reason}, RunTable.joined([])
                    return
                yield meta, runs

    def _runs(self, batch: Any) -> RunTable:
        # Arrow does not check offsets and lengths of columns that it reads.
        batch.validate(full=True)
        if any(column.null_count for column in batch.columns):
            raise UsageError("damaged: a value is missing")
        columns = [batch.column(name).to_numpy(zero_copy_only=False) for name in COLUMNS]
        # A recording's mappings come and go, so runs are found by address alone.
        vma = np.zeros(batch.num_rows, np.int32)
        return checked_runs(columns, vma, self.description.geometry.page_size, ADDRESS_LIMIT)

    @staticmethod
    def _checksum(batch: Any) -> int:
        return _crc(tuple(batch.column(name).to_numpy(zero_copy_only=False) for name in COLUMNS))


_MAKE_ONE = "make one with: mthp record PID -o FILE"
