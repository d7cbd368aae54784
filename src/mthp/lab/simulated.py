"""Results of simulations in a file: Parquet, one row for each sample, with the scenario beside the rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mthp.errors import UnsupportedError, UsageError
from mthp.files import PUBLIC, creating
from mthp.lab.scenario import Scenario
from mthp.lab.simulation import Outcome, Row

KEY = b"mthp.simulate"
SCHEMA = "mthp.simulate-file/1"


@dataclass(frozen=True)
class Simulated:
    """What a file holds.

    Attributes:
        rows: of all runs, in their order.
        about: ``scenario`` (the file's text), ``name``, ``seed``, ``geometry``, ``policies``, ``version``.
    """

    rows: Sequence[Row]
    about: dict[str, Any]


def about(scenario: Scenario, seed: int, policies: Sequence[str], version: str) -> dict[str, Any]:
    """What is told beside the rows."""
    geometry = scenario.geometry
    return {
        "schema": SCHEMA,
        "name": Path(scenario.path).name,
        "scenario": scenario.text,
        "seed": seed,
        "policies": list(policies),
        "geometry": {"name": geometry.name, "page_size": geometry.page_size, "pmd_order": geometry.pmd_order},
        "version": version,
    }


def write(path: Path, outcomes: Sequence[Outcome], told: dict[str, Any], *, overwrite: bool = False) -> None:
    """Write the rows of `outcomes` to `path`. The same rows give the same bytes.

    Raises:
        MthpError: the file exists, or cannot be written.
        UnsupportedError: pyarrow is not installed.
    """
    arrow, parquet = _arrow()
    rows = [row for outcome in outcomes for row in outcome.rows]
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = arrow.table({name: [row.get(name) for row in rows] for name in names})
    table = table.replace_schema_metadata({KEY: json.dumps(told)})
    with creating(path, overwrite=overwrite, mode=PUBLIC) as file:
        parquet.write_table(table, file, compression="zstd")


def is_simulated(path: Path) -> bool:
    """Whether the file at `path` holds results of a simulation; False if it cannot be read."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"PAR1":
                return False
        _, parquet = _arrow()
        return KEY in (parquet.read_metadata(path).metadata or {})
    except (OSError, ValueError):
        return False


def read(path: Path) -> Simulated:
    """What :func:`write` wrote.

    Raises:
        UsageError: it is something else, or damaged.
        UnsupportedError: pyarrow is not installed.
    """
    arrow, parquet = _arrow()
    try:
        table = parquet.read_table(path)
        told = json.loads(table.schema.metadata[KEY])
        rows = table.to_pylist()
    except (OSError, ValueError, KeyError, TypeError, arrow.ArrowException) as error:
        raise UsageError(f"{path}: no result of `mthp simulate`, or damaged: {error}") from error
    if told.get("schema") != SCHEMA or not rows:
        raise UsageError(f"{path}: no result of `mthp simulate`, or empty")
    return Simulated(rows, told)


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UnsupportedError(
            f"results need pyarrow, which cannot be imported: {error}", help="pip install 'mthp[snapshot]'"
        ) from error
    return pyarrow, parquet
