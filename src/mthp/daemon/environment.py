"""State that all targets of the daemon share, and the interval of looks at them.

A look is one read of ``/proc/PID/stat``. Looks take a small share of a core, on any machine and with any targets.
Targets in which folios may be made, and those in which no mapping allows it, have a share each: a thousand idle shells
do not delay the look that notices new memory of an advised process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

from mthp.addrspace import AddressSpace
from mthp.daemon.config import Configuration
from mthp.daemon.pressure import FreeFolios
from mthp.daemon.telemetry import Services, WorkCounters
from mthp.engine.allowed import mechanism_of
from mthp.geometry import Geometry
from mthp.means import Means, Mechanism
from mthp.naming import ProcessFacts
from mthp.pacing import ByteBudget, Clock
from mthp.tunables import Switches, Tunables

SHORTEST_LOOK = 0.02
"""Least seconds between two looks at the same process, whatever scan_sleep_millisecs is."""


LOOK_SHARE = 0.0015
"""The part of a core that the looks at one kind of targets may take. Waking up and choosing the target cost two to
three times as much as the look (measured, with warm and with cold caches), so all of it costs half a percent.
"""

SHORTEST_ROUND = 0.5
"""Least seconds between two looks at the same idle target: new memory is then worked on within a second."""

FIRST_LOOK = 0.5
"""Seconds until the next look after a change. They double up to the interval of :class:`Looks`, or to
scan_sleep_millisecs if that is shorter.
"""

WAKE_GRID = 0.25
"""Seconds: the looks of idle targets begin at multiples of this, because each wake costs more than a look."""

_WEIGHT = 1 / 64
"""Weight of the last look in the mean duration of a look."""


class Looks:
    """The mean cost of a look, and the targets that share the looks.

    Args:
        spent: CPU seconds of the calling thread.
    """

    def __init__(self, spent: Clock = time.thread_time) -> None:
        self.spent = spent
        self._mean = 0.0
        self._targets: dict[bool, set[object]] = {True: set(), False: set()}

    def took(self, seconds: float) -> None:
        """Note the CPU time of one look."""
        self._mean += (seconds - self._mean) * _WEIGHT

    def put(self, target: object, *, eligible: bool) -> None:
        """Note whether folios may be made in a target."""
        self._targets[not eligible].discard(target)
        self._targets[eligible].add(target)

    def drop(self, target: object) -> None:
        """Forget a target."""
        for kind in self._targets.values():
            kind.discard(target)

    def interval(self, target: object) -> float:
        """Return the seconds between two looks at an idle target."""
        kind = self._targets[target in self._targets[True]]
        return max(SHORTEST_ROUND, len(kind) * self._mean / LOOK_SHARE)


def on_grid(at: float, interval: float) -> float:
    """Return `at`, or a little later, so that many idle targets wake the daemon together."""
    # Rounded up. Short intervals stay as they are, because the grid would lengthen them several times.
    return -(-at // WAKE_GRID) * WAKE_GRID if interval >= FIRST_LOOK else at


@dataclass
class Environment:
    """State that all targets share.

    Attributes:
        switches, tunables: the current ones: the configuration's over the system's.
        free: orders with free folios.
        total: counters of all targets together.
        services: counters by rule and service.
        reload_at: time of the last reading of the configuration, in seconds since 1970.
        reload_refused: whether that configuration was refused.
        pass_at: time of the end of the last pass, in seconds since 1970; 0.0 before the first.
        bytes: budget of bytes per second of all targets together.
        opened: opens the address space of a PID.
        looks: intervals between looks at targets.
        stopping: called between pieces; returns whether to stop.
        said: subjects of lines that were printed, see :meth:`say_once`.
    """

    geometry: Geometry
    configuration: Configuration
    switches: Switches
    tunables: Tunables
    opened: Callable[[int], AddressSpace]
    event: Callable[..., None]
    say: Callable[[str], None] = lambda line: None
    free: FreeFolios = field(default_factory=FreeFolios)
    total: WorkCounters = field(default_factory=WorkCounters)
    services: Services = field(default_factory=Services)
    reload_at: float = field(default_factory=time.time)
    reload_refused: bool = False
    pass_at: float = 0.0
    looks: Looks = field(default_factory=Looks)
    stopping: Callable[[], bool] = lambda: False
    clock: Clock = time.monotonic
    _mechanisms: dict[tuple[Mechanism, bool], dict[int, Mechanism]] = field(default_factory=dict)
    said: set[object] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.bytes = ByteBudget(self.configuration.bytes_per_second, self.clock)

    def mechanisms(self, space: AddressSpace, means: Means) -> dict[int, Mechanism]:
        """Return the mechanism for each order that `means` make, cached because it depends on the machine alone."""
        # khugepaged cannot keep a rate (mechanism_of()).
        key = means.mechanism, means.rate is None
        if key not in self._mechanisms:
            found = {order: mechanism_of(space, order, means) for order in self.geometry.anon_orders}
            self._mechanisms[key] = {order: mechanism for order, mechanism in found.items() if mechanism is not None}
        return self._mechanisms[key]

    def switches_for(self, makes: Collection[int]) -> Switches:
        """Return the effective switches of a target: the sizes that it does not make (`makes`) are off."""
        sizes = {order: word if order in makes else "never" for order, word in self.switches.sizes.items()}
        return replace(self.switches, sizes=sizes)

    def decided_by(self, makes: Collection[int]) -> object:
        """Return the switches and tunables that decide the work in a target, for comparison with another time."""
        switches, tunables = self.switches_for(makes), self.tunables
        # Both with and without advice, because mappings may have been advised since.
        sizes = [switches.orders(advised=advised) for advised in (True, False)]
        return sizes, tunables.max_ptes_none, tunables.max_ptes_swap, tunables.max_ptes_shared

    def event_of(self, facts: ProcessFacts, event: str, **values: Any) -> None:
        """Write an event of a process."""
        self.event(event, pid=facts.pid, comm=facts.comm, **values)

    def say_once(self, about: object, line: str) -> None:
        """Print a line about a lasting condition, once until the configuration is read again."""
        if about not in self.said:
            self.said.add(about)
            self.say(line)

    @property
    def scan_sleep(self) -> float:
        """The seconds between two looks by scan_sleep_millisecs, at least `SHORTEST_LOOK`."""
        return max(self.tunables.scan_sleep_millisecs / 1000, SHORTEST_LOOK)

    def ranges_within(self, rate: int | None, most: int) -> int:
        """Return the most PMD ranges for one piece of work, fewer if a rate would make more of them a burst.

        Args:
            rate: bytes a second of the target; None for unlimited.
            most: result if no rate allows fewer; one is always allowed.
        """
        rates = [each for each in (rate, self.configuration.bytes_per_second) if each]
        if self.configuration.pace == "kernel":
            # Ten times, because a piece is a tenth: what khugepaged scans between two rests.
            rates.append(self.tunables.pages_to_scan * self.geometry.page_size * 10)
        # A tenth of a second's bytes.
        return max(1, min([most, *(each // 10 // self.geometry.pmd_size for each in rates)]))
