"""Reports on results in files: the output of `mthp compare --json`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mthp.bounded import JSON_BYTES, parse_json, read_small
from mthp.errors import UsageError
from mthp.files import begins
from mthp.geometry import Geometry
from mthp.lab.rows import checked_rows
from mthp.report.compared import Compared, section
from mthp.report.document import Command, Document

SCHEMA = "mthp.compare/1"

ROW_KEYS = {
    "setting": str,
    "policy": str,
    "scan": int,
    "coverage": float,
    "large_coverage": float,
    "bloat_bytes": int,
    "bloat_share": float,
    "creep_bytes": int,
    "copied_bytes": int,
    "resident_bytes": int,
    "translations": float,
}
"""Keys of a row that a report needs, and their types."""


def is_json(path: Path) -> bool:
    """Return whether the file at `path` begins as a JSON object does; False if it cannot be read."""
    return begins(path, 64).lstrip()[:1] == b"{"


def report_on_comparison(path: Path, commands: Sequence[Command]) -> Document:
    """Return the report on the output of `mthp compare --json` in the file at `path`.

    Raises:
        UsageError: the file is something else, cut short, or damaged.
    """
    text = read_small(path, JSON_BYTES)
    try:
        data = parse_json(text)
    except UsageError as error:
        raise UsageError(f"{path}: not a result, or cut short: {error}", help=error.help or _MAKE_ONE) from error
    # A command that failed prints an object with its schema and the error.
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or "error" in data:
        raise UsageError(f"{path}: JSON, but not of `mthp compare`", help=_MAKE_ONE)
    try:
        compared, target, processor = _compared(data), str(data["target"]), str(data["processor"]["name"])
        notes = [str(note) for note in data.get("missing", [])]
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", help=error.help or _MAKE_ONE) from error
    # The file may have any JSON in these places.
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(f"{path}: damaged: {error} is missing or not valid", help=_MAKE_ONE) from error
    return Document(
        title=target,
        verdict=compared.verdict[0],
        facts=(
            ("process", target),
            ("machine", f"{compared.geometry.name}, pages of {compared.geometry.label(0)}"),
            ("TLB", processor),
        ),
        sections=(section(compared),),
        commands=commands,
        notes=notes,
    )


_MAKE_ONE = "make one with: mthp compare TARGET --scans all --json > compare.json"


def _compared(data: dict[str, Any]) -> Compared:
    geometry = Geometry(**{key: data["geometry"][key] for key in ("name", "page_size", "pmd_order")})
    rows = checked_rows(data["rows"], ROW_KEYS)
    verdict = [str(sentence) for sentence in data["verdict"]]
    if not rows or not verdict:
        raise ValueError("rows")
    order = geometry.check_order(data["covered_order"])
    return Compared(geometry, geometry.label(order), rows, frozenset(data["frontier"]), verdict)
