"""A small service, of which a machine runs many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mthp.lab.workloads.parameters import Duration, Share, Size
from mthp.lab.workloads.program import Life, Program


@dataclass(frozen=True)
class Service:
    """A service in a memory cgroup: a steady core, work that comes in bursts, and long idle times.

    The core is the memory of a runtime and its libraries. A burst of requests takes memory from the top of the heap and
    returns most of it when it is over. Holes stay where objects outlive the burst.

    Attributes:
        core: bytes that are always resident.
        burst: additional bytes during a burst.
        every: mean time from one burst to the next.
        lasts: duration of a burst.
        stays: part of a burst's pages that outlive it.
    """

    SOURCE: ClassVar[str] = "mallopt(3) M_TRIM_THRESHOLD; memory cgroups, one for each service"

    core: Size = 12 << 20
    burst: Size = 8 << 20
    every: Duration = 8.0
    lasts: Duration = 2.0
    stays: Share = 0.05

    @property
    def most(self) -> int:
        """The core and a burst."""
        return self.core + self.burst

    def live(self, program: Program) -> Life:
        """Idle, burst, idle."""
        rng = program.rng
        heap, core, extra = program.map(self.most), program.pages(self.core), program.pages(self.burst)
        program.write(heap, np.arange(core))
        # Services of one machine are not in step.
        begins = float(rng.uniform(0, self.every))
        ends: float | None = None
        while True:
            now = yield
            if ends is None and now >= begins:
                program.write(heap, core + np.arange(extra))
                ends = now + self.lasts
            elif ends is not None and now >= ends:
                stay = rng.random(extra) < self.stays
                # As glibc does when the top of the heap is free beyond M_TRIM_THRESHOLD (mallopt(3)).
                program.give_back(heap, core + np.flatnonzero(~stay))
                begins, ends = now + float(rng.exponential(self.every)), None
            program.write(heap, rng.integers(0, core, max(1, core // 200)))
