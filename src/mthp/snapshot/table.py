"""The Parquet file of a snapshot. pyarrow is imported only when a file is opened.

One row is one run (:mod:`mthp.snapshot.runs`); ``start`` is an address in bytes. Row groups hold about
:data:`ROW_GROUP_RUNS` rows each, so that writer and reader need the memory of a few row groups, not of the file.
The runs carry checksums, which the reader verifies: a flipped bit there is an error, not a different process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import sys
from collections.abc import Iterator
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from mthp.bounded import named
from mthp.errors import UnsupportedError, UsageError
from mthp.files import open_regular, writing
from mthp.ptes import ORDER_NONE
from mthp.snapshot.bounds import RUNS, RUNS_IN_ALL
from mthp.snapshot.description import ADDRESS_LIMIT, KEY, STATE_BITS, Description, SnapshotInfo
from mthp.snapshot.parquetpages import inflated_bytes
from mthp.snapshot.runs import RunTable, checked_runs, joined

ROW_GROUP_RUNS = 1 << 16

COLUMNS = {"vma": "int32", "start": "uint64", "pages": "uint64", "state": "uint16", "folio_order": "int8"}
"""Columns of the table and their Arrow types."""


def pyarrow(module: str = "pyarrow") -> Any:
    """Return the optional dependency, imported now.

    Raises:
        UnsupportedError: it is not installed, or does not work.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnsupportedError(
            f"this file needs pyarrow, which cannot be imported: {error}",
            help="pip install 'mthp[snapshot]', or use a file name that ends with .mthp",
        ) from error


def _read_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of damaged files; pyarrow's only if it was imported, because it raises none otherwise."""
    arrow = sys.modules.get("pyarrow")
    return (OSError, ValueError, MemoryError, *(() if arrow is None else (arrow.ArrowException,)))


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Turn errors from reading `path` into a :class:`~mthp.errors.UsageError` with the path."""
    try:
        with named(path):
            yield
    except UsageError:
        raise
    except _read_errors() as error:
        # Arrow raises OSError without an errno for damaged contents, and ArrowMemoryError for absurd sizes in them.
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        reason = getattr(error, "strerror", None) or f"damaged or cut short: {first_line}"
        raise UsageError(f"{path}: {reason}") from error


class RunWriter:
    """Writes runs into a file in row groups. A context manager.

    Without :meth:`finish` the file is incomplete.

    Args:
        file: open for writing, at its start.
        path: name of the file in errors.

    Attributes:
        runs: rows written so far.
        pages: number of base pages in them.
    """

    def __init__(self, file: BinaryIO, path: str, page_size: int) -> None:
        self._path = path
        self._page_size = page_size
        self._tail = RunTable.joined([])
        self._waiting: list[RunTable] = []
        self.runs = 0
        self.pages = 0
        with writing(path):
            self._begin(file)

    def add(self, runs: RunTable) -> None:
        """Append runs that lie behind all before them.

        Raises:
            MthpError: the file cannot be written.
        """
        runs = joined(RunTable.joined([self._tail, runs]))
        # The last run is held back, because the next block may extend it.
        self._tail = runs[-1:]
        if len(runs) > 1:
            self._waiting.append(runs[:-1])
        # Blocks of the address space have any number of runs; row groups should not.
        if sum(map(len, self._waiting)) >= ROW_GROUP_RUNS:
            self._flush()

    def finish(self, description: Description) -> Description:
        """Write the remaining runs and `description`; return it with the number of pages.

        Raises:
            MthpError: the file cannot be written.
        """
        self._waiting.append(self._tail)
        self._flush()
        description = dataclasses.replace(description, pages=self.pages)
        with writing(self._path):
            self._end(description)
        return description

    def _flush(self) -> None:
        runs = RunTable.joined(self._waiting)
        self._waiting = []
        if not len(runs):
            return
        with writing(self._path):
            self._write(runs)
        self.runs += len(runs)
        self.pages += int(runs.pages.sum())

    def _begin(self, file: BinaryIO) -> None:
        arrow = pyarrow()
        self._table = arrow.table
        self._schema = arrow.schema([(name, getattr(arrow, kind)()) for name, kind in COLUMNS.items()])
        self._writer = pyarrow("pyarrow.parquet").ParquetWriter(
            file,
            self._schema,
            compression="zstd",
            use_dictionary=["vma", "pages", "state", "folio_order"],
            # Ascending numbers, all different: a dictionary would be as large as the column.
            column_encoding={"start": "DELTA_BINARY_PACKED"},
            write_page_checksum=True,
            store_schema=False,
        )

    def _write(self, runs: RunTable) -> None:
        columns = {
            "vma": runs.vma,
            "start": runs.first.astype(np.uint64) * np.uint64(self._page_size),
            "pages": runs.pages.astype(np.uint64),
            "state": runs.state,
            "folio_order": runs.folio_order,
        }
        self._writer.write_table(self._table(columns, schema=self._schema), row_group_size=len(runs))

    def _end(self, description: Description) -> None:
        # At the end, because the number of pages is known only now; Parquet's footer is there in any case.
        self._writer.add_key_value_metadata({KEY: description.to_json()})
        self._writer.close()

    def _close(self) -> None:
        # After a failure the writer would finish its file when it is garbage collected, after the file was removed.
        with contextlib.suppress(OSError):
            self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()


class RunReader:
    """An open snapshot file: its description, and its runs by row group.

    Attributes:
        description: checked, but not compared with the runs.

    Raises:
        UsageError: missing, unreadable, not a snapshot, damaged, or of a newer version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with contextlib.ExitStack() as opened, reading(self.path):
            file = self._file = opened.enter_context(open_regular(path))
            self._size = os.fstat(file.fileno()).st_size
            self._open(file)
            # Now that nothing can fail any more, the file stays open until close().
            self._opened = opened.pop_all()

    def _open(self, file: BinaryIO) -> None:
        """Read the description and the number of runs."""
        self._parquet = _snapshot(file)
        self.description = _description(self._parquet)
        RUNS_IN_ALL.check(self._row_count)

    @property
    def _row_count(self) -> int:
        return int(self._parquet.metadata.num_rows)

    @property
    def row_groups(self) -> int:
        """Number of row groups."""
        return int(self._parquet.num_row_groups)

    @property
    def info(self) -> SnapshotInfo:
        """The summary of the file."""
        return self.description.info(self.path, self._row_count, self._size)

    def runs(self, row_group: int) -> RunTable:
        """Return the runs of one row group, their state in this version's bits.

        Raises:
            UsageError: the row group is damaged.
        """
        with reading(self.path):
            runs = self._read(row_group)
        state = self._own_bits(runs.state)
        # A state of unknown bits alone is none here, and a none page has no order.
        folio_order = np.where(state == 0, np.int8(ORDER_NONE), runs.folio_order)
        return dataclasses.replace(runs, state=state, folio_order=folio_order)

    def _read(self, row_group: int) -> RunTable:
        _check_row_group(self._parquet, self._file, row_group)
        table = self._parquet.read_row_group(row_group, columns=list(COLUMNS), use_threads=False)
        if any(column.null_count for column in table.columns):
            raise UsageError("damaged: a value is missing")
        vma, *columns = (table.column(name).to_numpy() for name in COLUMNS)
        return checked_runs(columns, vma, self.description.geometry.page_size, ADDRESS_LIMIT)

    def _own_bits(self, state: NDArray[np.uint16]) -> NDArray[np.uint16]:
        if self.description.state_bits == STATE_BITS:
            return state
        # Another version wrote it: bits have other numbers, or unknown names, which are dropped.
        own = np.zeros_like(state)
        for name, bit in self.description.state_bits.items():
            own[(state & bit) != 0] |= STATE_BITS.get(name, 0)
        return own

    def close(self) -> None:
        """Close the file."""
        self._opened.close()


PARQUET_MAGIC = b"PAR1"
"""First bytes of a Parquet file."""

PLAIN_RUNS = b"mthpruns"
"""First bytes of a plain snapshot (:mod:`mthp.snapshot.plain`)."""

_FOOTER = {"thrift_string_size_limit": 1 << 27, "thrift_container_size_limit": 1 << 20}
"""Arrow's limits on a footer: bytes of one text, such as the description, and elements of one list."""


def open_parquet(file: BinaryIO, **options: Any) -> Any:
    """Return the Parquet file in `file`, with its columns not read yet.

    Raises:
        ArrowException, OSError: it is not a Parquet file, or damaged; :func:`reading` turns them into a UsageError.
    """
    return pyarrow("pyarrow.parquet").ParquetFile(file, page_checksum_verification=True, **_FOOTER, **options)


def _check_row_group(parquet: Any, file: BinaryIO, number: int) -> None:
    """Check the memory that reading a row group would need.

    Raises:
        UsageError: it is too much, or the file contradicts itself.
    """
    group = parquet.metadata.row_group(number)
    RUNS.check(group.num_rows)
    for index in range(group.num_columns):
        chunk = group.column(index)
        # A value of the widest column has 8 bytes; the rest is for levels, a dictionary, and checksums.
        if chunk.path_in_schema in COLUMNS and inflated_bytes(file, chunk) > 16 * group.num_rows + (1 << 20):
            raise UsageError("damaged: its columns are larger than its rows")


def _snapshot(file: BinaryIO) -> Any:
    """Return the Parquet file in `file`, checked to have this project's key.

    Raises:
        UsageError: it is another file.
    """
    magic = file.read(4)
    if magic != PARQUET_MAGIC:
        raise UsageError("not a snapshot: " + ("not a Parquet file" if magic else "the file is empty"), help=_MAKE_ONE)
    parquet = open_parquet(file)
    if KEY.encode() not in (parquet.metadata.metadata or {}):
        raise UsageError("not a snapshot: a Parquet file of something else", help=_MAKE_ONE)
    return parquet


_MAKE_ONE = "make one with: mthp snapshot PID -o FILE"


def _description(parquet: Any) -> Description:
    """Return the file's description; its columns are checked after the version, which may explain a difference."""
    description = Description.from_json(parquet.metadata.metadata[KEY.encode()])
    schema = parquet.schema_arrow
    for name, kind in COLUMNS.items():
        if name not in schema.names or str(schema.field(name).type) != kind:
            raise UsageError(f"damaged: it has no column {name!r} of type {kind}")
    return description
