"""khugepaged with multi-size transparent huge pages, in user space.

All public names are here. Each is imported at its first use, so that ``import mthp`` costs next to nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mthp import sim as sim
    from mthp import snapshot as snapshot
    from mthp.api import collapse as collapse
    from mthp.api import collapse_buffer as collapse_buffer
    from mthp.api import collapse_self as collapse_self
    from mthp.api import compare as compare
    from mthp.api import explain as explain
    from mthp.api import inspect as inspect
    from mthp.api import plan as plan
    from mthp.api import record as record
    from mthp.api import sweep as sweep
    from mthp.api import take_snapshot as take_snapshot
    from mthp.api import trim as trim
    from mthp.api import verify as verify
    from mthp.engine.khugepaged import Khugepaged as Khugepaged
    from mthp.engine.occupancy import Runs as Runs
    from mthp.engine.plan import Plan as Plan
    from mthp.engine.plan import plan_ranges as plan_ranges
    from mthp.engine.policy import Limits as Limits
    from mthp.engine.policy import Policy as Policy
    from mthp.engine.policy import Rules as Rules
    from mthp.errors import MthpError as MthpError
    from mthp.geometry import Geometry as Geometry
    from mthp.results import ScanResult as ScanResult
    from mthp.targets import find as find

__version__ = "0.1.0"

_HOMES = {
    "collapse": "mthp.api",
    "collapse_buffer": "mthp.api",
    "collapse_self": "mthp.api",
    "find": "mthp.targets",
    "compare": "mthp.api",
    "explain": "mthp.api",
    "inspect": "mthp.api",
    "plan": "mthp.api",
    "record": "mthp.api",
    "sweep": "mthp.api",
    "take_snapshot": "mthp.api",
    "trim": "mthp.api",
    "verify": "mthp.api",
    "Geometry": "mthp.geometry",
    "Khugepaged": "mthp.engine.khugepaged",
    "Limits": "mthp.engine.policy",
    "MthpError": "mthp.errors",
    "Plan": "mthp.engine.plan",
    "Policy": "mthp.engine.policy",
    "Rules": "mthp.engine.policy",
    "Runs": "mthp.engine.occupancy",
    "ScanResult": "mthp.results",
    "plan_ranges": "mthp.engine.plan",
}

_SUBPACKAGES = frozenset(("sim", "snapshot"))
"""Subpackages that are available as attributes without an import of their own."""

__all__ = ["__version__", *_HOMES, *_SUBPACKAGES]  # noqa: PLE0604


def __getattr__(name: str) -> object:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"mthp.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'mthp' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
