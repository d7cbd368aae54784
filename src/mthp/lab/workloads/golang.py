"""A garbage-collected heap with a runtime that returns free memory in the background."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mthp.lab.workloads.parameters import Duration, Factor, Size
from mthp.lab.workloads.program import Life, Program


@dataclass(frozen=True)
class GoHeap:
    """A Go heap: allocation up to a goal, a collection, and a scavenger behind it.

    The heap grows from its live size after the last collection to (1 + GOGC/100) times that size (runtime/mgc.go). Then
    dead spans are free. Free memory beyond the goal and a tenth is given back to the kernel in the background, with
    MADV_DONTNEED. Spans are 8 KiB and up; the heap is mapped in arenas of 64 MiB.

    Attributes:
        live_memory: bytes that survive a collection.
        allocate: bytes allocated every second.
        gogc: growth between collections, as a factor of the live memory: GOGC=200 is 200%.
        span: pages' worth of bytes that live and die together.
        phase: time from one drop of half of the live memory, as of a cache, to the next; 0 for none.
    """

    SOURCE: ClassVar[str] = "Go runtime: mgc.go, mgcscavenge.go, mpagealloc.go; A Guide to the Go Garbage Collector"

    live_memory: Size = 64 << 20
    allocate: Size = 64 << 20
    gogc: Factor = 1.0
    span: Size = 8 << 10
    phase: Duration = 30.0

    ARENA: ClassVar[int] = 64 << 20
    SCAVENGE_SHARE: ClassVar[float] = 0.05

    @property
    def most(self) -> int:
        """The goal, and the tenth more that the scavenger leaves."""
        return int(self.live_memory * (1 + self.gogc) * 1.1)

    def live(self, program: Program) -> Life:
        """Allocate, collect, scavenge."""
        rng, per_span = program.rng, program.pages(self.span)
        size = -(-self.most // self.ARENA) * self.ARENA
        heap = program.map(size)
        spans = program.pages(size) // per_span
        in_use, resident = np.zeros(spans, np.bool_), np.zeros(spans, np.bool_)
        live = max(1, int(self.live_memory / self.span))
        next_phase = self.phase
        while True:
            now = yield
            # At least one more than lives, or nothing could be allocated and the loop below would not end.
            goal = max(live + 1, int(live * (1 + self.gogc)))
            wanted = int(self.allocate * program.tick / self.span)
            while wanted > 0:
                room = max(0, goal - int(in_use.sum()))
                # From the lowest address up (runtime/mpagealloc.go).
                new = np.flatnonzero(~in_use)[: min(wanted, room)]
                in_use[new] = resident[new] = True
                program.write(heap, (new[:, None] * per_span + np.arange(per_span)).ravel())
                wanted -= len(new)
                if len(new) < room:
                    break
                # Old and new spans die alike, because reachable objects are scattered over the heap.
                users = np.flatnonzero(in_use)
                in_use[rng.permutation(users)[live:]] = False
            if self.phase and now >= next_phase:
                users = np.flatnonzero(in_use)
                in_use[rng.permutation(users)[: len(users) // 2]] = False
                next_phase += self.phase
            idle = np.flatnonzero(resident & ~in_use)
            excess = int(resident.sum()) - int(goal * 1.1)
            # From the highest address down, at a bounded pace (runtime/mgcscavenge.go).
            gone = idle[::-1][: max(0, min(excess, int(len(idle) * self.SCAVENGE_SHARE) + 1))]
            resident[gone] = False
            program.give_back(heap, (gone[:, None] * per_span + np.arange(per_span)).ravel())
