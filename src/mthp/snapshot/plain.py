"""Snapshots and recordings without pyarrow: a sequence of blocks of JSON and deflated columns.

A file is plain if its name ends with :data:`SUFFIX`; readers recognise it by its first eight bytes. It has the same
contents as the Parquet file of a snapshot or the Arrow stream of a recording, and readers of both kinds have the same
methods. It is for machines on which 170 MB of pyarrow are too much; other programs read Parquet and Arrow.

The first eight bytes are followed by blocks::

    uint32  length of the JSON text
    uint32  rows
    uint64  length of the deflated columns
    uint32  CRC-32 of text and columns
    text, columns

Numbers are little-endian. The columns follow one another in the order of :data:`COLUMNS`, ``start`` as differences
between neighbours. The first block of a recording has its description, and each of the others is a step. A snapshot has
its runs first, and its description in the last block, which has no rows.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from mthp.bounded import JSON_BYTES, Bound, inflate, named, parse_json
from mthp.errors import UsageError
from mthp.files import open_regular
from mthp.snapshot.bounds import BLOCKS, RUNS, RUNS_IN_ALL
from mthp.snapshot.description import ADDRESS_LIMIT, Description
from mthp.snapshot.runs import RunTable, checked_runs
from mthp.snapshot.stream import PLAIN_STEPS, Meta, StreamReader, StreamWriter
from mthp.snapshot.table import PLAIN_RUNS, RunReader, RunWriter

SUFFIX = ".mthp"
"""Suffix of the name of a plain file."""

COLUMNS = {"vma": "<i4", "start": "<u8", "pages": "<u8", "state": "<u2", "folio_order": "i1"}
"""Columns of a block, and their NumPy types."""

_ROW = sum(np.dtype(kind).itemsize for kind in COLUMNS.values())
_HEADER = struct.Struct("<IIQI")


def is_plain(path: str | os.PathLike[str]) -> bool:
    """Return whether a new file of this name is to be plain."""
    return os.fspath(path).endswith(SUFFIX)


def _packed(text: str, runs: RunTable, page_size: int) -> bytes:
    """Return the bytes of a block."""
    start = runs.first.astype(np.uint64) * np.uint64(page_size)
    # Differences, because addresses hardly compress, and the steps from run to run do.
    steps = np.diff(start, prepend=np.uint64(0))
    columns: list[NDArray[Any]] = [runs.vma, steps, runs.pages, runs.state, runs.folio_order]
    raw = b"".join(column.astype(kind).tobytes() for column, kind in zip(columns, COLUMNS.values(), strict=True))
    encoded, packed = text.encode(), zlib.compress(raw, 6) if raw else b""
    checksum = zlib.crc32(packed, zlib.crc32(encoded))
    return _HEADER.pack(len(encoded), len(runs), len(packed), checksum) + encoded + packed


@dataclass(frozen=True, slots=True)
class _FileBlock:
    """A block of a file.

    Attributes:
        text: the JSON text.
        rows: number of runs.
        columns: the deflated columns.
    """

    text: bytes
    rows: int
    columns: bytes

    @classmethod
    def read(cls, file: BinaryIO) -> _FileBlock | None:
        """Return the block at the current position of `file`; None at the end of the file.

        Raises:
            UsageError: it is cut short or damaged, or would need more memory than is allowed.
        """
        header = file.read(_HEADER.size)
        if not header:
            return None
        if len(header) < _HEADER.size:
            raise UsageError("damaged: cut short")
        length, rows, packed, checksum = _HEADER.unpack(header)
        # Lengths are checked before data of that length is read: deflate never doubles its input.
        JSON_BYTES.check(length)
        RUNS.check(rows)
        if packed > 2 * _ROW * rows + 1024 or (packed == 0) != (rows == 0):
            raise UsageError("damaged: the columns of a block do not fit its rows")
        text, columns = file.read(length), file.read(packed)
        if len(text) < length or len(columns) < packed:
            raise UsageError("damaged: cut short")
        # Before anything is parsed or inflated.
        if zlib.crc32(columns, zlib.crc32(text)) != checksum:
            raise UsageError("damaged: a checksum is wrong")
        return cls(text, rows, columns)

    def runs(self, page_size: int) -> RunTable:
        """Return the runs.

        Raises:
            UsageError: the columns are damaged.
        """
        if not self.rows:
            return RunTable.joined([])
        # The rows, which were checked, bound what is inflated.
        raw = inflate(self.columns, Bound(self.rows, "rows of a block"), unit=_ROW)
        if len(raw) != self.rows * _ROW:
            raise UsageError("damaged: the columns of a block do not fit its rows")
        columns: list[NDArray[Any]] = []
        at = 0
        for kind in map(np.dtype, COLUMNS.values()):
            columns.append(np.frombuffer(raw, kind, self.rows, at))
            at += self.rows * kind.itemsize
        vma, start, *others = columns
        # Sums of 64 bits wrap, as the differences did.
        return checked_runs([np.cumsum(start, dtype=np.uint64), *others], vma, page_size, ADDRESS_LIMIT)


class PlainRunWriter(RunWriter):
    """Writes the runs of a snapshot into a plain file."""

    def _begin(self, file: BinaryIO) -> None:
        self._file = file
        file.write(PLAIN_RUNS)

    def _write(self, runs: RunTable) -> None:
        self._file.write(_packed("", runs, self._page_size))

    def _end(self, description: Description) -> None:
        self._file.write(_packed(description.to_json(), RunTable.joined([]), self._page_size))

    def _close(self) -> None:
        pass


class PlainRunReader(RunReader):
    """An open plain snapshot."""

    def _open(self, file: BinaryIO) -> None:
        file.seek(len(PLAIN_RUNS))
        self._begins: list[int] = []
        self._rows = 0
        while True:
            begin = file.tell()
            block = _FileBlock.read(file)
            if block is None:
                raise UsageError("damaged: cut short")
            # The description is the last block, and has no rows.
            if not block.rows:
                break
            self._begins.append(begin)
            self._rows += block.rows
            BLOCKS.check(len(self._begins))
            RUNS_IN_ALL.check(self._rows)
        self.description = Description.from_json(block.text)

    @property
    def _row_count(self) -> int:
        return self._rows

    @property
    def row_groups(self) -> int:
        """Number of row groups."""
        return len(self._begins)

    def _read(self, row_group: int) -> RunTable:
        self._file.seek(self._begins[row_group])
        block = _FileBlock.read(self._file)
        if block is None:
            raise UsageError("damaged: cut short")
        return block.runs(self.description.geometry.page_size)


class PlainStreamWriter(StreamWriter):
    """Writes a recording into a plain file, step by step."""

    def _begin(self, description: Description) -> None:
        self._new.raw.write(PLAIN_STEPS + _packed(description.to_json(), RunTable.joined([]), self._page_size))

    def _write(self, runs: RunTable, meta: Meta) -> None:
        # In one call, so that an incomplete block means that the file broke off.
        self._new.raw.write(_packed(json.dumps(meta, separators=(",", ":")), runs, self._page_size))

    def _close(self) -> None:
        pass


class PlainStreamReader(StreamReader):
    """Reads a plain recording from its beginning."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        with self._file() as file, named(self.path):
            block = self._next(file)
            if block is None:
                raise UsageError("damaged: cut short")
            self.description = Description.from_json(block.text)

    def _file(self) -> BinaryIO:
        try:
            file = open_regular(self.path)
        except OSError as error:
            raise UsageError(f"{self.path}: {error.strerror}") from error
        file.seek(len(PLAIN_STEPS))
        return file

    @staticmethod
    def _next(file: BinaryIO) -> _FileBlock | None:
        try:
            return _FileBlock.read(file)
        except (OSError, MemoryError) as error:
            raise UsageError(f"damaged or cut short: {error}") from error

    def steps(self) -> Iterator[tuple[Meta, RunTable]]:
        """Yield all complete steps, as :meth:`StreamReader.steps` does."""
        with self._file() as file:
            self._next(file)
            while True:
                try:
                    block = self._next(file)
                    if block is None:
                        return
                    meta, runs = parse_json(block.text), block.runs(self.description.geometry.page_size)
                    if not isinstance(meta, dict):
                        raise UsageError("damaged: the description of a step is not a JSON object")
                except UsageError as error:
                    # A file beyond a bound is not a truncated file: the reader must report it.
                    if error.help:
                        raise UsageError(f"{self.path}: {error.message}", help=error.help) from error
                    yield {"broken": error.message}, RunTable.joined([])
                    return
                yield meta, runs
