"""A grid of settings from a TOML file: every combination of its values is one setting."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

from mthp.bounded import Bound, named
from mthp.engine.policy_lookup import known_policy
from mthp.engine.select import PlanOptions
from mthp.lab.compare import settings_of
from mthp.lab.tlb import known_processor
from mthp.toml import TomlDocument, whole
from mthp.tomlexample import commented, table_text

SETTINGS = Bound(1 << 14, "settings of a grid")
"""The most settings, because each is a plan of every input."""

NUMBERS = ("max_ptes_none", "max_ptes_swap", "max_ptes_shared", "mthp_min_order")


Counts = tuple[Annotated[int, whole()], ...]


def _scans(value: object) -> int | None:
    return None if value == "all" else int(whole(1, 1000)(value))


@dataclass(frozen=True, slots=True)
class Grid:
    """The values of the settings, and the number of scans.

    Attributes:
        policies: names of policies.
        max_ptes_none, max_ptes_swap, max_ptes_shared, mthp_min_order: values; not set (empty): the machine's own.
        orders: folio sizes that may be made: "64K,2M", "all", or "enabled"; not set (empty): all.
        include_file: whether memory of files and shared memory counts, too.
        scans: number of scans; "all" (None) for as many as it takes until nothing changes.
        steps: steps of a recording: "last" or "all".
        processor: count page walks of this processor's TLB, for the trace that a recording was made from, without one
            for accesses that are distributed like the recorded heat, which takes a second for each setting; not set
            (None): none are counted.
    """

    policies: tuple[Annotated[str, known_policy], ...]
    max_ptes_none: Counts = ()
    max_ptes_swap: Counts = ()
    max_ptes_shared: Counts = ()
    mthp_min_order: Counts = ()
    orders: tuple[str, ...] = ()
    include_file: bool = False
    scans: Annotated[int | None, _scans] = 1
    steps: Literal["last", "all"] = field(default="last")
    processor: Annotated[str, known_processor] | None = None

    def settings(self) -> list[PlanOptions]:
        """Return every combination of the values, always in the same order."""
        return settings_of(
            self.policies,
            max_ptes_none=self.max_ptes_none or (None,),
            max_ptes_swap=self.max_ptes_swap or (None,),
            max_ptes_shared=self.max_ptes_shared or (None,),
            mthp_min_order=self.mthp_min_order or (None,),
            orders=tuple(None if sizes == "all" else sizes for sizes in self.orders) or (None,),
            include_file=self.include_file,
        )

    def text(self) -> str:
        """Return the grid as one line, which is equal for equal grids."""
        return json.dumps(asdict(self), sort_keys=True)


def example() -> str:
    """Return the text of a grid with every key."""
    return commented(_ABOVE) + table_text(Grid, "", examples=_EXAMPLES)


_ABOVE = """\
A grid for mthp sweep --grid FILE: every combination of the values is one setting. Every key is shown; a key in a
comment has its default value, or an example if it has none.
"""

_EXAMPLES = {
    "policies": ["rfc", "mainline", "no-creep"],
    "max_ptes_none": [0, 64, 256, 511],
    "max_ptes_swap": [64],
    "max_ptes_shared": [256],
    "mthp_min_order": [3],
    "orders": ["all", "64K,2M", "enabled"],
    "processor": "skylake",
}


def read_grid(path: str | os.PathLike[str]) -> Grid:
    """Return the grid in the TOML file at `path`.

    Raises:
        UsageError: a missing file, not TOML, an unknown key, a value of the wrong kind, or an unknown policy.
    """
    document = TomlDocument.load(path)
    grid = document.table(Grid)
    document.check()
    assert grid is not None
    with named(path):
        # Before settings() makes them all.
        SETTINGS.check(math.prod(max(1, len(getattr(grid, key))) for key in ("policies", *NUMBERS, "orders")))
    return grid
