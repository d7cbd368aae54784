"""What all targets of the daemon share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from mthp.addrspace import AddressSpace
from mthp.daemon.configuration import Configuration
from mthp.daemon.counters import Counters, Services
from mthp.daemon.looks import Looks
from mthp.daemon.pressure import FreeFolios
from mthp.engine.allowed import mechanism_of
from mthp.geometry import Geometry
from mthp.means import Means, Mechanism
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
        services: counters by rule and service.
        bytes: the budget of bytes per second of all together.
        opened: opens the address space of a PID.
        event: writes an event.
        say: tells a person what happens.
        looks: how often targets are looked at.
        stopping: asked between pieces: whether to end.
        clock: the time.
        said: what a person was told of, see :meth:`say_once`.
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
    say: Callable[[str], None] = lambda line: None
    services: Services = field(default_factory=Services)
    looks: Looks = field(default_factory=Looks)
    stopping: Callable[[], bool] = lambda: False
    clock: Clock = time.monotonic
    _mechanisms: dict[tuple[Mechanism, bool], dict[int, Mechanism | None]] = field(default_factory=dict)
    said: set[object] = field(default_factory=set)

    def mechanisms(self, space: AddressSpace, means: Means) -> dict[int, Mechanism | None]:
        """Return what makes the folios of each order by `means`: found out once, as it lies in the machine."""
        key = means.mechanism, means.rate is None
        if key not in self._mechanisms:
            orders = self.geometry.anon_orders
            self._mechanisms[key] = {order: mechanism_of(space, order, means) for order in orders}
        return self._mechanisms[key]

    def say_once(self, about: object, line: str) -> None:
        """Tell a person what holds for many passes, once until the configuration is read again."""
        if about not in self.said:
            self.said.add(about)
            self.say(line)

    @property
    def scan_sleep(self) -> float:
        """Seconds."""
        return max(self.tunables.scan_sleep_millisecs / 1000, SHORTEST_LOOK)

    def ranges_within(self, rate: int | None, most: int) -> int:
        """Return how many PMD ranges one piece of work may have: fewer where a rate would make more of them a burst.

        Args:
            rate: bytes a second of the target; None for no bound.
            most: if no rate allows fewer; one is always allowed.
        """
        rates = [each for each in (rate, self.configuration.bytes_per_second) if each]
        if self.configuration.pace == "kernel":
            rates.append(self.tunables.pages_to_scan * self.geometry.page_size * 10)
        return max(1, min([most, *(each // 10 // self.geometry.pmd_size for each in rates)]))
