"""A program with a large address space of which it uses little."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mthp.lab.workloads.parameters import Duration, Share, Size
from mthp.lab.workloads.program import Life, Program


@dataclass(frozen=True)
class SparseArena:
    """A few hundred megabytes scattered over gigabytes: a process of 369 MB that huge pages made gigabytes of.

    Operators of servers report this of their programs as the reason to switch THP off; in gperftools issue 1494
    khugepaged's max_ptes_none allows it. Each thread has heaps of its own, touches short runs of pages all over them,
    and is idle most of the time.

    Attributes:
        memory: bytes that are touched.
        reserve: bytes that are mapped.
        run: bytes that are touched together.
        grow: duration of the growth.
        reuse: part of the touched memory that is written again every second.
    """

    SOURCE: ClassVar[str] = "glibc malloc/arena.c (HEAP_MAX_SIZE); gperftools issue 1494"

    memory: Size = 369 << 20
    reserve: Size = 4 << 30
    run: Size = 16 << 10
    grow: Duration = 10.0
    reuse: Share = 0.05

    # HEAP_MAX_SIZE on 64-bit (malloc/arena.c of glibc).
    HEAP: ClassVar[int] = 64 << 20

    @property
    def most(self) -> int:
        """The bytes that are touched, without those that a collapse fills."""
        return self.memory

    def live(self, program: Program) -> Life:
        """Touch runs at random, then some of them again."""
        rng, per_run = program.rng, program.pages(self.run)
        size = min(self.HEAP, self.reserve)
        heaps = [program.map(size) for _ in range(max(1, -(-self.reserve // self.HEAP)))]
        slots = program.pages(size) // per_run
        # Every slot at most once, so exactly `memory` becomes resident.
        order = rng.permutation(len(heaps) * slots)[: program.pages(self.memory) // per_run]
        done = 0

        def write(chosen: NDArray[np.int64]) -> None:
            owner, at = np.divmod(chosen, slots)
            for number in np.unique(owner).tolist():
                runs = at[owner == number]
                program.write(heaps[number], (runs[:, None] * per_run + np.arange(per_run)).ravel())

        while True:
            now = yield
            until = len(order) if now >= self.grow else int(len(order) * now / self.grow)
            write(order[done:until])
            done = until
            if done:
                write(rng.choice(order[:done], int(done * self.reuse * program.tick)))
