"""Checks of the batches of an Arrow stream before Arrow decompresses them.

Arrow allocates by the lengths in a message without checks, so this module checks each against the file, and against the
number of rows of the batch.
"""

from __future__ import annotations

import os
import struct
from typing import BinaryIO

from mthp.bounded import JSON_BYTES
from mthp.errors import UsageError
from mthp.snapshot.bounds import RUNS

_MARK = 0xFFFF_FFFF
_SCHEMA, _RECORD_BATCH = 1, 3
"""Types of messages (Message.fbs, MessageHeader); recordings do not have others, such as dictionaries."""

_WIDEST = 8
"""Bytes of a value of the widest column."""

_PADDING = 1 << 10
"""Most bytes of a buffer beyond its values; Arrow pads to 64."""


def check_message(file: BinaryIO, columns: int) -> None:
    """Check the message at the current position of `file`, and restore the position.

    A truncated message is left to Arrow, which reports it.

    Args:
        columns: number of columns of a batch.

    Raises:
        UsageError: it would need more memory than is allowed, or its header makes no sense.
    """
    begin = file.tell()
    try:
        _check(file, os.fstat(file.fileno()).st_size - begin, columns)
    except (struct.error, IndexError) as error:
        raise UsageError("damaged: the header of a step is not valid") from error
    finally:
        file.seek(begin)


def _check(file: BinaryIO, there: int, columns: int) -> None:
    position, begin = file.tell(), file.read(8)
    if len(begin) < 8:
        return
    # A mark, the length of a header, the header and a body (Arrow Columnar Format, "Encapsulated message format").
    mark, size = struct.unpack("<II", begin)
    if mark != _MARK:
        raise UsageError("damaged: a step does not begin where it should")
    # The JSON object of a step is in its header.
    JSON_BYTES.check(size)
    if size == 0 or size > there - 8:
        return
    header = file.read(size)
    # A FlatBuffer begins with the offset of its root table.
    message = _Table(header, struct.unpack_from("<I", header)[0])
    # Fields by their place in Message.fbs: header_type, and bodyLength.
    kind, body = message.number(1, "<B"), message.number(3, "<q")
    if kind not in (_SCHEMA, _RECORD_BATCH) or body < 0:
        raise UsageError("damaged: a step is not a table")
    # A truncated body is left to Arrow; a schema has none.
    if body > there - 8 - size or kind == _SCHEMA:
        return
    batch = message.table(2)
    rows = batch.number(0, "<q")
    if rows < 0:
        raise UsageError("damaged: the rows of a step are not valid")
    RUNS.check(rows)
    buffers, count = batch.vector(2)
    # A map of missing values, and the values, for each column.
    if count != 2 * columns:
        raise UsageError("damaged: a step has not the columns of a recording")
    # RecordBatch of Message.fbs: buffers are field 2, compression is field 3.
    compressed = batch.has(3)
    for number in range(count):
        # struct Buffer of Schema.fbs.
        offset, length = struct.unpack_from("<qq", header, buffers + 16 * number)
        if offset < 0 or length < 0 or offset + length > body:
            raise UsageError("damaged: a column of a step lies outside of it")
        if compressed and length:
            file.seek(position + 8 + size + offset)
            # A compressed buffer begins with its decompressed length; -1 for one that is not compressed after all.
            (inflated,) = struct.unpack("<q", file.read(8))
            length = length if inflated < 0 else inflated
        if length > _WIDEST * rows + _PADDING:
            raise UsageError("damaged: a column of a step is larger than its rows")


class _Table:
    """A table of a FlatBuffer with fields by number (FlatBuffer Internals, "Tables")."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        # The vtable, which may lie on either side of its table.
        self._fields = at - struct.unpack_from("<i", data, at)[0]
        if self._fields < 0:
            raise struct.error

    def _offset(self, field: int) -> int:
        """Return the offset of a field from the table's beginning; 0 if it is absent."""
        size: int = struct.unpack_from("<H", self._data, self._fields)[0]
        # Behind the sizes of the vtable and of the table. A short vtable lacks the fields that a newer schema added.
        place = 4 + 2 * field
        return int(struct.unpack_from("<H", self._data, self._fields + place)[0]) if place < size else 0

    def has(self, field: int) -> bool:
        """Return whether a field is present."""
        return self._offset(field) != 0

    def number(self, field: int, form: str) -> int:
        """Return a number; 0 if the field is absent."""
        offset = self._offset(field)
        return int(struct.unpack_from(form, self._data, self._at + offset)[0]) if offset else 0

    def _target(self, field: int) -> int:
        offset = self._offset(field)
        if not offset:
            raise struct.error
        at = self._at + offset
        return at + int(struct.unpack_from("<I", self._data, at)[0])

    def table(self, field: int) -> _Table:
        """Return a table that a field refers to."""
        return _Table(self._data, self._target(field))

    def vector(self, field: int) -> tuple[int, int]:
        """Return the position of the elements of a vector, and their number."""
        at = self._target(field)
        return at + 4, int(struct.unpack_from("<I", self._data, at)[0])
