"""A grid of settings, as a TOML file says it: every combination of the values is one setting.

::

    policies = ["rfc", "mainline", "no-creep"]   # required
    max_ptes_none = [0, 64, 256, 511]            # any of these may be left out: the target machine's own value then
    max_ptes_swap = [64]
    max_ptes_shared = [256]
    mthp_min_order = [3]
    orders = ["all", "64K,2M", "enabled"]
    include_file = false                         # memory of files and shared memory, too
    scans = 1                                    # or "all": until nothing changes
    steps = "last"                               # or "all": every step of a recording
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mthp.bounded import Bound, named, read_toml
from mthp.collapse.policy_lookup import policy_named
from mthp.errors import UsageError
from mthp.lab.compare import settings_of
from mthp.planning import PlanOptions

SETTINGS = Bound(1 << 14, "settings of a grid")
"""Each is a plan of every input."""

NUMBERS = ("max_ptes_none", "max_ptes_swap", "max_ptes_shared", "mthp_min_order")


@dataclass(frozen=True, slots=True)
class Grid:
    """Settings, and how far each is taken.

    Attributes:
        policies: names.
        max_ptes_none, max_ptes_swap, max_ptes_shared, mthp_min_order: values; empty for the target machine's own.
        orders: folio sizes as texts; empty for all.
        include_file: memory of files and shared memory, too.
        scans: how many; None for as many as it takes.
        steps: which steps of a recording.
    """

    policies: tuple[str, ...]
    max_ptes_none: tuple[int, ...] = ()
    max_ptes_swap: tuple[int, ...] = ()
    max_ptes_shared: tuple[int, ...] = ()
    mthp_min_order: tuple[int, ...] = ()
    orders: tuple[str, ...] = ()
    include_file: bool = False
    scans: int | None = 1
    steps: Literal["last", "all"] = field(default="last")

    def settings(self) -> list[PlanOptions]:
        """Every combination, in the same order every time."""
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
        """The grid as one line, the same for the same grid."""
        return json.dumps(asdict(self), sort_keys=True)


def read_grid(path: str | os.PathLike[str]) -> Grid:
    """Read the grid in the TOML file at `path`.

    Raises:
        UsageError: missing, not TOML, an unknown key, a value of the wrong kind, or an unknown policy.
    """
    _, data = read_toml(path)
    with named(path):
        grid = _grid(data)
        SETTINGS.check(math.prod(max(1, len(getattr(grid, key))) for key in ("policies", *NUMBERS, "orders")))
    return grid


def _grid(data: dict[str, Any]) -> Grid:
    known = ("policies", *NUMBERS, "orders", "include_file", "scans", "steps")
    if unknown := [key for key in data if key not in known]:
        raise UsageError(f"unknown key {unknown[0]!r}", help=f"keys are {', '.join(known)}")
    policies = _listed(data, "policies", str)
    if not policies:
        raise UsageError("no policies are named", help='write policies = ["rfc", "mainline"]')
    for policy in policies:
        policy_named(policy)
    steps = data.get("steps", "last")
    if steps not in ("last", "all"):
        raise UsageError(f"steps is {steps!r}: it must be 'last' or 'all'")
    include_file = data.get("include_file", False)
    if not isinstance(include_file, bool):
        raise UsageError(f"include_file is {include_file!r}: it must be true or false")
    numbers = {key: _listed(data, key, int) for key in NUMBERS}
    for key, values in numbers.items():
        if any(value < 0 for value in values):
            raise UsageError(f"{key} has a value below 0")
    return Grid(
        policies=policies,
        orders=_listed(data, "orders", str),
        include_file=include_file,
        scans=_scans(data.get("scans", 1)),
        steps=steps,
        **numbers,
    )


def _listed(data: dict[str, Any], key: str, kind: type) -> tuple[Any, ...]:
    """The values of `key`, each once: a list, or one value."""
    values = data.get(key, [])
    if not isinstance(values, Sequence) or isinstance(values, str):
        values = [values]
    for value in values:
        if not isinstance(value, kind) or isinstance(value, bool):
            raise UsageError(f"{key} has {value!r}: it must be {'text' if kind is str else 'a whole number'}")
    return tuple(dict.fromkeys(values))


def _scans(value: object) -> int | None:
    if value == "all":
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1000:
        raise UsageError(f"scans is {value!r}: it must be a number from 1 to 1000, or 'all'")
    return value
