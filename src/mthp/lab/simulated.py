"""Results of simulations, in memory and in a Parquet file: a row for each sample, with the scenario as metadata."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from mthp.bounded import named, parse_json
from mthp.errors import UsageError
from mthp.files import PUBLIC, creating
from mthp.geometry import Geometry
from mthp.lab import figures
from mthp.lab.figures import Row
from mthp.lab.rows import checked_rows
from mthp.lab.scenariotables import Scenario
from mthp.snapshot.rowfiles import columns_and_metadata, read_rows
from mthp.snapshot.table import pyarrow

KEY = b"mthp.simulate"
SCHEMA = "mthp.simulate-file/1"

_KINDS = {
    **dict.fromkeys(("policy", "process"), str),
    **dict.fromkeys(("seconds", "huge_coverage", "large_coverage"), float),
    "resident_bytes": int,
}
"""The required columns of every row, with their types."""

_KINDS_OF_ALL = {
    **dict.fromkeys(("khugepaged_seconds", "alloc_failure_share", "bloat_share"), float),
    **dict.fromkeys(("bloat_bytes", "copied_bytes"), int),
}
"""The required columns of rows of all processes together, in addition to `_KINDS`."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run.

    Attributes:
        policy: the policy of the run, as :mod:`mthp.lab.makers` names it.
        rows: one for each sample and process, and one for all processes together, with ``""`` as `process`; the
            columns are those of :mod:`mthp.lab.figures`.
        interrupted: the caller stopped it.
    """

    policy: str
    rows: list[Row]
    interrupted: bool = False

    @property
    def last(self) -> Row:
        """The last row of all processes together."""
        return next(row for row in reversed(self.rows) if not row["process"])

    def time_to_coverage(self, wanted: float) -> float:
        """Return the simulated seconds until PMD entries mapped the part `wanted` of all memory; inf if never."""
        whole = [row for row in self.rows if not row["process"]]
        return figures.time_to_coverage(
            [row["seconds"] for row in whole], [row["huge_coverage"] for row in whole], wanted
        )


@dataclass(frozen=True)
class Simulation:
    """Runs of one scenario.

    Attributes:
        scenario: the scenario.
        seed: seed of all random numbers.
        policies: one for each run.
        outcomes: outcomes of the runs; fewer than policies if interrupted.
    """

    JSON: ClassVar = "name=scenario.name seed policies geometry interrupted rows"

    scenario: Scenario
    seed: int
    policies: list[str]
    outcomes: list[Outcome]

    @property
    def geometry(self) -> Geometry:
        """Geometry of the simulated machine."""
        return self.scenario.geometry

    @property
    def interrupted(self) -> bool:
        """Whether the caller stopped it."""
        return self.outcomes[-1].interrupted

    @property
    def rows(self) -> list[Row]:
        """The rows of all runs."""
        return [row for outcome in self.outcomes for row in outcome.rows]


@dataclass(frozen=True)
class Simulated:
    """The contents of a file.

    Attributes:
        rows: rows of all runs, in their order.
        about: ``scenario`` (the file's text), ``name``, ``seed``, ``geometry``, ``policies``, ``version``.
    """

    rows: Sequence[Row]
    about: dict[str, Any]


def about(scenario: Scenario, seed: int, policies: Sequence[str], version: str) -> dict[str, Any]:
    """Return the metadata of a file."""
    return {
        "schema": SCHEMA,
        "name": scenario.name,
        "scenario": scenario.text,
        "seed": seed,
        "policies": list(policies),
        "geometry": dataclasses.asdict(scenario.geometry),
        "version": version,
    }


def write(path: Path, outcomes: Sequence[Outcome], description: dict[str, Any], *, overwrite: bool = False) -> None:
    """Write the rows of `outcomes` to `path`. Equal rows make equal bytes.

    Raises:
        MthpError: the file exists, or cannot be written.
        UnsupportedError: pyarrow is not installed.
    """
    arrow, parquet = pyarrow(), pyarrow("pyarrow.parquet")
    rows = [row for outcome in outcomes for row in outcome.rows]
    # Rows of one process lack the columns of all together.
    names = list(dict.fromkeys(name for row in rows for name in row))
    table = arrow.table({name: [row.get(name) for row in rows] for name in names})
    table = table.replace_schema_metadata({KEY: json.dumps(description)})
    with creating(path, overwrite=overwrite, mode=PUBLIC) as file:
        parquet.write_table(table, file, compression="zstd")


def is_simulated(path: Path) -> bool:
    """Return whether the file at `path` has results of a simulation; False if it cannot be read."""
    return KEY in columns_and_metadata(path)[1]


def read(path: Path) -> Simulated:
    """Return the contents of a file that :func:`write` wrote.

    Raises:
        UsageError: the file is another one, or damaged.
        UnsupportedError: pyarrow is not installed.
    """
    rows, metadata = read_rows(path)
    with named(path):
        description = parse_json(metadata.get(KEY, b"null"))
        if not isinstance(description, dict) or description.get("schema") != SCHEMA or not rows:
            raise UsageError("not a result of `mthp simulate`, or an empty one")
        rows = checked_rows(rows, _KINDS)
        checked_rows([row for row in rows if not row["process"]], _KINDS_OF_ALL)
    return Simulated(rows, description)
