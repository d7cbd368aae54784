"""The operations of a model of a program, and how it is run.

A model is a generator of a program's actions from tick to tick: each ``yield`` ends a tick, and returns the time of the
next. So a model reads like the program's life: grow, then serve, then fork.

It acts only through a :class:`Program`: one address space of the machine, with a program's operations on it. All
chance comes from its generator of random numbers, which the scenario seeds, so runs are repeatable.
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
"""A program's actions: every ``yield`` returns the seconds since its start."""

BASE = 0x7F00_0000_0000
"""Address of a program's first mapping; its mappings follow each other, a PMD range apart."""


class KilledError(Exception):
    """The program was killed because no memory was left."""


class Model(Protocol):
    """A model: a dataclass of parameters."""

    SOURCE: ClassVar[str]
    """The documents that the model follows."""

    @property
    def most(self) -> int:
        """About the most bytes that it has resident at one time, for comparison with the machine."""

    def live(self, program: Program) -> Life:
        """Return the generator of the program's actions."""


class Program:
    """A program: an address space, and the operations on it.

    Args:
        machine: the machine.
        name: name of the program.
        rng: its source of chance.
        cgroup: its memory cgroup.
        advise: whether its mappings have MADV_HUGEPAGE.
        tick: seconds from one tick to the next.

    Attributes:
        machine, name, rng, tick: the arguments.
        mm: the address space.
        children: living address spaces that it forked.
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
        # VM_HUGEPAGE, by its name in the VmFlags of smaps (fs/proc/task_mmu.c, show_smap_vma_flags).
        self._flags = {"hg"} if advise else set[str]()
        self._next = BASE

    @property
    def page(self) -> int:
        """Bytes in a base page."""
        return self.machine.geometry.page_size

    def pages(self, size: float) -> int:
        """Return the whole pages in `size` bytes, rounded up."""
        return -(-int(size) // self.page)

    def map(self, size: int, *, at: int | None = None) -> int:
        """Map `size` bytes, rounded up to pages; return the address, by default aligned to the PMD size."""
        pmd = self.machine.geometry.pmd_size
        size = self.pages(size) * self.page
        start = self._next if at is None else at
        self.machine.map(self.mm, start, start + size, flags=self._flags)
        if at is None:
            # The gap keeps mappings from merging, as a guard page does.
            self._next = start + -(-size // pmd) * pmd + pmd
        return start

    def advise(self) -> None:
        """Set MADV_HUGEPAGE for all present and future mappings."""
        self._flags = {"hg"}
        for vma in list(self.mm.vmas) if self.alive else ():
            self.machine.madvise(self.mm, vma.start, vma.end, "HUGEPAGE")

    def unmap(self, start: int, size: int) -> None:
        """Unmap `size` bytes (munmap(2))."""
        self.machine.munmap(self.mm, start, start + self.pages(size) * self.page)

    def write(self, start: int, pages: NDArray[np.int64] | Iterable[int], *, mm: Mm | None = None) -> None:
        """Write to pages by their number behind `start`.

        Raises:
            KilledError: no memory was left.
        """
        self._touch(start, pages, self.mm if mm is None else mm, write=True)

    def read(self, start: int, pages: NDArray[np.int64] | Iterable[int], *, mm: Mm | None = None) -> None:
        """Read from pages by their number behind `start`.

        Raises:
            KilledError: no memory was left.
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
        """Fork, and return the address space of the child."""
        child = self.machine.fork(self.mm)
        self.children.append(child)
        return child

    def end_child(self, child: Mm) -> None:
        """Let a child exit."""
        if child in self.children:
            self.children.remove(child)
            self.machine.exit(child)

    def end(self) -> None:
        """Let the program and its children exit. Ending twice does nothing."""
        for child in list(self.children):
            self.end_child(child)
        if self.alive:
            self.alive = False
            self.machine.exit(self.mm)
