"""Results in Parquet files, as rows of Python objects: small tables of figures and names."""

from __future__ import annotations

import io
import os
from typing import Any

from mthp.errors import UsageError
from mthp.files import begins, open_regular
from mthp.snapshot.bounds import CELLS, TEXT_BYTES
from mthp.snapshot.parquetpages import inflated_bytes
from mthp.snapshot.table import PARQUET_MAGIC, open_parquet, pyarrow, reading

Row = dict[str, Any]


def columns_and_metadata(path: str | os.PathLike[str]) -> tuple[list[str], dict[bytes, bytes]]:
    """Return the column names and the metadata of the Parquet file at `path`; empty for other files."""
    if begins(path, len(PARQUET_MAGIC)) != PARQUET_MAGIC:
        return [], {}
    try:
        with open_regular(path) as file:
            parquet = open_parquet(file)
            return list(parquet.schema_arrow.names), dict(parquet.metadata.metadata or {})
    except (OSError, ValueError, UsageError, pyarrow().ArrowException):
        return [], {}


def read_rows(path: str | os.PathLike[str]) -> tuple[list[Row], dict[bytes, bytes]]:
    """Return the rows and the metadata of the Parquet file at `path`.

    Raises:
        UsageError: it cannot be read, is damaged, or exceeds the bounds.
    """
    with reading(os.fspath(path)), open_regular(path) as file:
        parquet = open_parquet(file)
        metadata = parquet.metadata
        # Before anything is read: the footer may claim any number.
        CELLS.check(metadata.num_rows * metadata.num_columns)
        # Arrow would repeat a text for every row; as a dictionary it does not.
        texts = [field.name for field in parquet.schema_arrow if _is_text(field.type)]
        _check_sizes(parquet, file)
        file.seek(0)
        table = pyarrow("pyarrow.parquet").read_table(
            io.BytesIO(file.read()),
            read_dictionary=texts,
            use_threads=False,
            page_checksum_verification=True,
        )
        # to_pylist() makes a text of its own for every row.
        TEXT_BYTES.check(sum(_text_bytes(table.column(name)) for name in texts))
        rows: list[Row] = table.to_pylist()
    return rows, dict(metadata.metadata or {})


def _is_text(kind: Any) -> bool:
    types = pyarrow("pyarrow.types")
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return bool(types.is_string(kind) or types.is_large_string(kind))


def _check_sizes(parquet: Any, file: Any) -> None:
    schema = parquet.schema_arrow
    # Nested columns would escape the count of cells.
    if not all(_is_text(kind) or _is_figure(kind) for kind in schema.types):
        raise UsageError("damaged: a column holds neither numbers nor texts")
    total = 0
    for number in range(parquet.metadata.num_row_groups):
        group = parquet.metadata.row_group(number)
        total += sum(inflated_bytes(file, group.column(index)) for index in range(group.num_columns))
        TEXT_BYTES.check(total)


def _is_figure(kind: Any) -> bool:
    types = pyarrow("pyarrow.types")
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_boolean(kind) or types.is_null(kind))


def _text_bytes(column: Any) -> int:
    """Return the bytes of all texts of a column with dictionaries."""
    compute = pyarrow("pyarrow.compute")
    total = 0
    for chunk in column.chunks:
        # From the dictionary, without making the texts.
        lengths = compute.fill_null(compute.binary_length(chunk.dictionary), 0)
        total += int(compute.sum(compute.cast(compute.take(lengths, chunk.indices), "int64")).as_py() or 0)
    return total
