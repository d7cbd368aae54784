"""khugepaged with multi-size transparent huge pages, in user space.

Everything public is here, and imported when it is first used, so that ``import mthp`` costs next to nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mthp import sim as sim
    from mthp.api import collapse as collapse
    from mthp.api import collapse_buffer as collapse_buffer
    from mthp.api import collapse_self as collapse_self
    from mthp.api import inspect as inspect
    from mthp.api import plan as plan
    from mthp.collapse.occupancy import Runs as Runs
    from mthp.collapse.plan import Plan as Plan
    from mthp.collapse.plan import plan_ranges as plan_ranges
    from mthp.collapse.policy import Limits as Limits
    from mthp.collapse.policy import Policy as Policy
    from mthp.collapse.policy import Rules as Rules
    from mthp.errors import MthpError as MthpError
    from mthp.geometry import Geometry as Geometry
    from mthp.results import ScanResult as ScanResult
    from mthp.scanning import Khugepaged as Khugepaged

__version__ = "0.1.0"

_HOMES = {
    "collapse": "mthp.api",
    "collapse_buffer": "mthp.api",
    "collapse_self": "mthp.api",
    "inspect": "mthp.api",
    "plan": "mthp.api",
    "Geometry": "mthp.geometry",
    "Khugepaged": "mthp.scanning",
    "Limits": "mthp.collapse.policy",
    "MthpError": "mthp.errors",
    "Plan": "mthp.collapse.plan",
    "Policy": "mthp.collapse.policy",
    "Rules": "mthp.collapse.policy",
    "Runs": "mthp.collapse.occupancy",
    "ScanResult": "mthp.results",
    "plan_ranges": "mthp.collapse.plan",
}

_SUBPACKAGES = frozenset(("sim",))
"""Subpackages that are reached as attributes, without an import of their own."""

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


class _Package(ModuleType):
    """This package, in which `collapse` is the function, though a subpackage has the same name.

    The import system binds a subpackage in its parent when it is first imported, which would hide the function.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _HOMES or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
