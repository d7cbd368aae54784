"""Decompressed sizes of the pages of a Parquet file, read from their headers.

The footer has the size of each column chunk, compressed and not, but Arrow allocates by the header in front of each
page: up to 2 GiB for every few kilobytes of file. So the headers are walked before Arrow decompresses the pages.
"""

from __future__ import annotations

from typing import Any, BinaryIO

from mthp.errors import UsageError

HEADER_BYTES = 1 << 16
"""A header has some 50 bytes; its statistics may hold two values of a text column."""

MOST_PAGES = 1 << 16
"""Pages of one column chunk. Writers make one for each megabyte."""

_DEPTH = 8
"""Most nested structures; a header has three."""


def inflated_bytes(file: BinaryIO, chunk: Any) -> int:
    """Return the decompressed size of a column chunk, in bytes.

    It is the sum of the pages, or the size in the footer if that is larger.

    Args:
        chunk: pyarrow's metadata of the column chunk.

    Raises:
        UsageError: the headers do not fill the chunk as in the footer.
    """
    at = chunk.data_page_offset
    if chunk.has_dictionary_page and chunk.dictionary_page_offset:
        # Where there is a dictionary, its page comes first.
        at = min(at, chunk.dictionary_page_offset)
    end, total = at + chunk.total_compressed_size, 0
    if at < 0 or chunk.total_compressed_size < 0:
        raise _damaged()
    # Bounded, because each page may claim a few bytes only.
    for _ in range(MOST_PAGES):
        if at >= end:
            return max(total, int(chunk.total_uncompressed_size))
        file.seek(at)
        header = _Thrift(file.read(min(HEADER_BYTES, end - at)))
        inflated, compressed = header.page_sizes()
        if inflated < 0 or compressed < 0:
            raise _damaged()
        total += inflated
        at += header.at + compressed
    raise _damaged()


def _damaged() -> UsageError:
    return UsageError("damaged or cut short: the sizes of its pages contradict each other")


class _Thrift:
    """Reads one structure of Thrift's compact protocol."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def page_sizes(self) -> tuple[int, int]:
        """Return the fields 2 and 3 of the structure, 32-bit integers, and move behind the structure."""
        # PageHeader of parquet.thrift: the decompressed size of the page, and its size in the file. The other fields
        # are parsed only to find the end of the header.
        found = {2: -1, 3: -1}
        try:
            self._structure(found, 0)
        except IndexError:
            raise _damaged() from None
        return found[2], found[3]

    def _structure(self, wanted: dict[int, int], depth: int) -> None:
        if depth > _DEPTH:
            raise _damaged()
        number = 0
        while head := self._byte():
            # Thrift's compact protocol: a difference to the number of the last field, or 0 and the number itself.
            kind, delta = head & 15, head >> 4
            number = number + delta if delta else self._integer()
            # 5 is a 32-bit integer; another type under that number is skipped, and leaves -1, which is refused.
            if kind == 5 and number in wanted:
                wanted[number] = self._integer()
            else:
                self._skip(kind, depth)

    def _skip(self, kind: int, depth: int) -> None:
        if kind in (1, 2):  # a truth value, encoded in the kind
            return
        if kind == 3:
            self._go(1)
        elif kind in (4, 5, 6):
            self._integer()
        elif kind == 7:
            self._go(8)
        elif kind == 8:
            self._go(self._unsigned())
        elif kind in (9, 10):
            head = self._byte()
            size = head >> 4 if head >> 4 != 15 else self._unsigned()
            for _ in range(size):
                # Truth values in a list have a byte each.
                self._skip(3 if head & 15 in (1, 2) else head & 15, depth + 1)
                self._go(0)
        elif kind == 12:
            self._structure({}, depth + 1)
        else:
            raise _damaged()

    def _byte(self) -> int:
        self.at += 1
        return self._data[self.at - 1]

    def _go(self, size: int) -> None:
        self.at += size
        if self.at > len(self._data):
            raise _damaged()

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise _damaged()

    def _integer(self) -> int:
        value = self._unsigned()
        # Zigzag: the sign is the lowest bit.
        return (value >> 1) ^ -(value & 1)
