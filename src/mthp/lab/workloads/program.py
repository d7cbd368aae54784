"""What a model of a program can do, and how it is run.

A model says what a program does from tick to tick as a generator: each ``yield`` ends a tick, and gives the time of the
next. So a model reads like the program's life: grow, then serve, then fork.

Its only means is a :class:`Program`: one address space of the machine, and what a program can do with it. All chance
comes from its generator of random numbers, which the scenario seeds, so a run repeats to the letter.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from mthp.sim import Machine
from mthp.sim.address_space.access import Fault
from mthp.sim.mm import Mm

Life = Generator[None, float, None]
"""What a program does: every ``yield`` gives the seconds since it started."""

BASE = 0x7F00_0000_0000
"""Where the first mapping of a program begins; those of one program follow each other, a PMD range apart."""


class KilledError(Exception):
    """The program is no more: memory was out."""


class Model(Protocol):
    """A model: a dataclass of parameters."""

    SOURCE: ClassVar[str]
    """What it follows."""

    @property
    def most(self) -> int:
        """Bytes that it may have resident at a time, about; to be compared with the machine."""

    def live(self, program: Program) -> Life:
        """What the program does."""


class Program:
    """A program: an address space, and what happens in it.

    Args:
        machine: the machine.
        name: of the program.
        rng: its source of chance.
        cgroup: its memory cgroup.
        advise: whether its mappings carry MADV_HUGEPAGE.
        tick: seconds from one tick to the next.

    Attributes:
        machine, name, rng, tick: as given.
        mm: the address space.
        children: address spaces that it forked and that live.
    """

    def __init__(
        self,
        machine: Machine,
        name: str,
        rng: np.random.Generator,
        *,
        cgroup: int = 0,
        advise: bool = True,
        tick: float = 0.1,
    ) -> None:
        self.machine, self.name, self.rng, self.tick = machine, name, rng, tick
        self.mm = machine.create_mm(cgroup)
        self.children: list[Mm] = []
        self.alive = True
        self._flags = {"hg"} if advise else set[str]()
        self._next = BASE

    @property
    def page(self) -> int:
        """Bytes in a base page."""
        return self.machine.geometry.page_size

    def pages(self, size: float) -> int:
        """Whole pages in `size` bytes, rounded up."""
        return -(-int(size) // self.page)

    def map(self, size: int, *, at: int | None = None) -> int:
        """Map `size` bytes, rounded up to pages: the address, aligned to the PMD size unless `at` says where."""
        pmd = self.machine.geometry.pmd_size
        size = self.pages(size) * self.page
        start = self._next if at is None else at
        self.machine.map(self.mm, start, start + size, flags=self._flags)
        if at is None:
            # The gap keeps mappings from being one, as a guard page does.
            self._next = start + -(-size // pmd) * pmd + pmd
        return start

    def advise(self) -> None:
        """MADV_HUGEPAGE for all that is mapped, and all that will be."""
        self._flags = {"hg"}
        for vma in list(self.mm.vmas) if self.alive else ():
            self.machine.madvise(self.mm, vma.start, vma.end, "HUGEPAGE")

    def unmap(self, start: int, size: int) -> None:
        """munmap(2)."""
        self.machine.munmap(self.mm, start, start + self.pages(size) * self.page)

    def write(self, start: int, pages: NDArray[np.int64] | Iterable[int], *, mm: Mm | None = None) -> None:
        """Write to pages by their number behind `start`.

        Raises:
            KilledError: memory was out.
        """
        self._touch(start, pages, self.mm if mm is None else mm, write=True)

    def read(self, start: int, pages: NDArray[np.int64] | Iterable[int], *, mm: Mm | None = None) -> None:
        """Read from them.

        Raises:
            KilledError: memory was out.
        """
        self._touch(start, pages, self.mm if mm is None else mm, write=False)

    def _touch(self, start: int, pages: Any, mm: Mm, *, write: bool) -> None:
        numbers = np.asarray(pages if isinstance(pages, np.ndarray) else list(pages), np.int64)
        if not len(numbers):
            return
        touched = self.machine.touch(mm, start + numbers * self.page, write=write)
        if touched.outcome is Fault.OOM:
            raise KilledError(self.name)
        assert touched.outcome is Fault.DONE, f"{self.name}: {touched.outcome}"

    def give_back(self, start: int, pages: NDArray[np.int64]) -> None:
        """Free pages (MADV_DONTNEED) by their number behind `start`, one call for each run of neighbours."""
        numbers = np.unique(pages)
        for run in np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1) if len(numbers) else []:
            first, last = int(run[0]), int(run[-1])
            self.machine.madvise(self.mm, start + first * self.page, start + (last + 1) * self.page, "DONTNEED")

    def fork(self) -> Mm:
        """A child."""
        child = self.machine.fork(self.mm)
        self.children.append(child)
        return child

    def end_child(self, child: Mm) -> None:
        """The child exits."""
        if child in self.children:
            self.children.remove(child)
            self.machine.exit(child)

    def end(self) -> None:
        """The program and its children exit. Ending twice does nothing."""
        for child in list(self.children):
            self.end_child(child)
        if self.alive:
            self.alive = False
            self.machine.exit(self.mm)
