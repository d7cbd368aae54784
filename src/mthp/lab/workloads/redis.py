"""A growing and ageing key-value store."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mthp.lab.workloads.parameters import Duration, Share, Size
from mthp.lab.workloads.program import Life, Program


@dataclass(frozen=True)
class Redis:
    """A store that grows to its size, is then overwritten and deleted from, and saves itself by forking.

    Values lie in slabs of an arena. Deleting frees short runs of pages all over; pages that are not used again within
    ten seconds go back to the kernel. A save is a fork that lives while the child writes the file (Redis documentation,
    "Redis persistence", BGSAVE): every page that the parent writes meanwhile is copied.

    Attributes:
        memory: size of the store.
        grow: duration of the growth.
        churn: part of the store that is overwritten or deleted every second afterwards.
        deletes: part of these that are deletes.
        save_every: time from one save to the next; 0 for none.
        save_takes: lifetime of the child.
    """

    SOURCE: ClassVar[str] = "jemalloc(3) opt.dirty_decay_ms; Redis documentation, Redis persistence"

    memory: Size = 256 << 20
    grow: Duration = 20.0
    churn: Share = 0.02
    deletes: Share = 0.3
    save_every: Duration = 30.0
    save_takes: Duration = 5.0

    # opt.dirty_decay_ms is 10 000 by default (jemalloc(3)).
    DECAY: ClassVar[float] = 10.0

    @property
    def most(self) -> int:
        """The store, and the pages that are copied during a save."""
        return int(self.memory * (1 + self.churn * self.save_takes))

    def live(self, program: Program) -> Life:
        """Grow, then churn and save."""
        total, rng = program.pages(self.memory), program.rng
        arena = program.map(self.memory)
        used = np.zeros(total, np.bool_)
        freed: deque[tuple[float, np.ndarray[tuple[int], np.dtype[np.int64]]]] = deque()
        child, child_ends, next_save = None, 0.0, self.save_every
        now = 0.0
        while True:
            now = yield
            goal = total if now >= self.grow else int(total * now / self.grow)
            writes = int(total * self.churn * program.tick) if now >= self.grow else 0
            deleted = int(writes * self.deletes)
            if writes:
                # Runs of 1 to 8 pages, so about a quarter as many runs as pages.
                starts = rng.integers(0, total, max(1, deleted // 4))
                runs = (starts[:, None] + np.arange(8)[None, :])[
                    np.arange(8)[None, :] < rng.integers(1, 9, (len(starts), 1))
                ]
                gone = np.unique(runs[runs < total])
                gone = gone[used[gone]]
                used[gone] = False
                freed.append((now, gone))
                live = np.flatnonzero(used)
                program.write(arena, rng.choice(live, min(len(live), writes - deleted)))
                # Most of the deleted keys are set again, at the lowest free addresses.
                goal = int(used.sum()) + int(len(gone) * 0.95)
            # From the lowest free address up, as jemalloc does.
            new = np.flatnonzero(~used)[: max(0, goal - int(used.sum()))]
            used[new] = True
            program.write(arena, new)
            while freed and now - freed[0][0] >= self.DECAY:
                pages = freed.popleft()[1]
                # MADV_DONTNEED, because muzzy decay is 0 as Redis builds jemalloc. Pages in use again stay.
                program.give_back(arena, pages[~used[pages]])
            if child is not None and now >= child_ends:
                program.end_child(child)
                child = None
            if self.save_every and child is None and now >= next_save:
                child, child_ends, next_save = program.fork(), now + self.save_takes, now + self.save_every
