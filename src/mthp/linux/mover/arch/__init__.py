"""The architectures of the mover, and the one that this program runs on."""

from __future__ import annotations

import os
from collections.abc import Mapping

from mthp.errors import UnsupportedError
from mthp.linux.mover.arch.aarch64 import Aarch64
from mthp.linux.mover.arch.architecture import Architecture
from mthp.linux.mover.arch.x86_64 import X8664

MACHINES: Mapping[str, type[Architecture]] = {"x86_64": X8664, "aarch64": Aarch64}
"""The machines that have a stub, by their names in ``uname -m``."""


def by_name(name: str) -> Architecture:
    """Return the machine with the ``uname -m`` name `name`; raise UnsupportedError if there is no stub for it."""
    if name not in MACHINES:
        raise UnsupportedError(f"the mover has no code for {name}", help=f"it has: {', '.join(MACHINES)}")
    return MACHINES[name]()


def native() -> Architecture:
    """Return the machine that this program runs on; raise UnsupportedError if there is no stub for it."""
    return by_name(os.uname().machine)
