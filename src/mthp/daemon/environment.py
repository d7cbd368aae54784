"""What all targets of the daemon share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mthp.addrspace import AddressSpace
from mthp.daemon.configuration import Configuration
from mthp.daemon.counters import Counters
from mthp.daemon.looks import Looks
from mthp.daemon.pressure import FreeFolios
from mthp.geometry import Geometry
from mthp.pacing import ByteBudget, Clock
from mthp.tunables import Switches, Tunables

SHORTEST_LOOK = 0.02
"""Seconds between two looks at the same process at least, whatever scan_sleep_millisecs says."""


@dataclass
class Environment:
    """What all targets share.

    Attributes:
        geometry: of the machine.
        configuration: what holds now.
        switches, tunables: the system's at this moment, the configuration's over them.
        free: of which orders there are folios.
        total: counters of all targets together.
        bytes: the budget of bytes per second of all together.
        opened: opens the address space of a PID.
        event: writes an event.
        looks: how often targets are looked at.
        stopping: asked between pieces: whether to end.
        clock: the time.
    """

    geometry: Geometry
    configuration: Configuration
    switches: Switches
    tunables: Tunables
    free: FreeFolios
    total: Counters
    bytes: ByteBudget
    opened: Callable[[int], AddressSpace]
    event: Callable[..., None]
    looks: Looks = field(default_factory=Looks)
    stopping: Callable[[], bool] = lambda: False
    clock: Clock = time.monotonic

    @property
    def scan_sleep(self) -> float:
        """Seconds."""
        return max(self.tunables.scan_sleep_millisecs / 1000, SHORTEST_LOOK)
