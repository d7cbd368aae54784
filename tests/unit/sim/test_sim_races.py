"""Another program acts between two steps of a collapse: it ends as the kernel's would, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest

from mthp.results import ScanResult
from mthp.sim import Machine
from mthp.sim.address_space.access import Fault
from mthp.sim.address_space.mremap import Remap
from mthp.sim.allocation.reclaim import reclaim
from mthp.sim.frames.memory import Fl
from mthp.sim.mm import Mm, Pmd
from mthp.sim.parts import CollapseStep
from simcheck import check
from simworld import PAGE, SMALL, START, World

END = START + SMALL.pmd_size
UNLOCKED = (CollapseStep.ALLOC_CHARGE, CollapseStep.REVALIDATE, CollapseStep.REVALIDATE_AGAIN)
"""Steps before which the kernel holds no lock of the address space."""

SHARED_LOCK = (*UNLOCKED, CollapseStep.SWAPIN)
"""Those steps, and the one before which the lock is held for reading only, so faults, pins and reclaim continue."""


def _reclaim(machine: Machine, mm: Mm) -> None:
    while mm.swap_entries < 12:
        assert reclaim(machine.parts, 32)


ACTORS: dict[str, tuple[tuple[CollapseStep, ...], ScanResult, Callable[[Machine, Mm], object]]] = {
    "a fault fills a hole": (
        SHARED_LOCK,
        ScanResult.PAGE_COUNT,  # The new page waits in the batch of the LRU lists.
        lambda machine, mm: machine.write(mm, START + 15 * PAGE, 16),
    ),
    "a write to a page": (SHARED_LOCK, ScanResult.SUCCEED, lambda machine, mm: machine.write(mm, START + PAGE, 2)),
    "munmap of it all": (UNLOCKED, ScanResult.VMA_NULL, lambda machine, mm: machine.munmap(mm, START, END)),
    "munmap of the first page": (
        UNLOCKED,
        ScanResult.ADDRESS_RANGE,
        lambda machine, mm: machine.munmap(mm, START, START + PAGE),
    ),
    "munmap of the last page": (
        UNLOCKED,
        ScanResult.ADDRESS_RANGE,
        lambda machine, mm: machine.munmap(mm, END - PAGE, END),
    ),
    "MADV_DONTNEED": (
        UNLOCKED,
        ScanResult.NO_PTE_TABLE,
        lambda machine, mm: machine.madvise(mm, START, END, "DONTNEED"),
    ),
    "MADV_NOHUGEPAGE": (
        UNLOCKED,
        ScanResult.VMA_CHECK,
        lambda machine, mm: machine.madvise(mm, START, END, "NOHUGEPAGE"),
    ),
    "mprotect of a part": (
        UNLOCKED,
        ScanResult.ADDRESS_RANGE,
        lambda machine, mm: machine.mprotect(mm, START, START + PAGE, "r--"),
    ),
    "mremap of it all": (
        UNLOCKED,
        ScanResult.ADDRESS_RANGE,
        lambda machine, mm: machine.mremap(mm, START, END, END - START, Remap.MAYMOVE | Remap.FIXED, 4 * START),
    ),
    "userfaultfd": (
        UNLOCKED,
        ScanResult.EXCEED_NONE_PTE,
        lambda machine, mm: machine.uffd_register(mm, START, END, ["missing"]),
    ),
    "prctl": (UNLOCKED, ScanResult.ANY_PROCESS, lambda machine, mm: machine.thp_disable(mm, True)),
    "fork": (UNLOCKED, ScanResult.EXCEED_SHARED_PTE, lambda machine, mm: machine.fork(mm)),
    "exit": (UNLOCKED, ScanResult.ANY_PROCESS, lambda machine, mm: machine.exit(mm)),
    "a pin": (SHARED_LOCK, ScanResult.PAGE_COUNT, lambda machine, mm: machine.pin(mm, START + 9 * PAGE)),
    "reclaim": (SHARED_LOCK, ScanResult.PTE_NON_PRESENT, _reclaim),
    "a migration": (
        SHARED_LOCK,
        ScanResult.PTE_NON_PRESENT,
        lambda machine, mm: machine.start_migration(mm, START + 9 * PAGE),
    ),
    "another collapse": (
        UNLOCKED,
        ScanResult.PMD_MAPPED,
        lambda machine, mm: machine.madvise(mm, START, END, "COLLAPSE"),
    ),
}

ENDS_OTHERWISE = {
    # The batch is emptied after that; swap entries are read back, and a migration is waited for.
    ("a fault fills a hole", CollapseStep.ALLOC_CHARGE): ScanResult.SUCCEED,
    ("a fault fills a hole", CollapseStep.REVALIDATE): ScanResult.SUCCEED,
    ("a fault fills a hole", CollapseStep.SWAPIN): ScanResult.SUCCEED,
    ("a migration", CollapseStep.ALLOC_CHARGE): ScanResult.SUCCEED,
    ("a migration", CollapseStep.REVALIDATE): ScanResult.SUCCEED,
    ("reclaim", CollapseStep.ALLOC_CHARGE): ScanResult.SUCCEED,
    ("reclaim", CollapseStep.REVALIDATE): ScanResult.SUCCEED,
    ("a migration", CollapseStep.SWAPIN): ScanResult.SUCCEED,
    ("reclaim", CollapseStep.SWAPIN): ScanResult.SUCCEED,
}
"""The outcome if one page was swapped out before, so that the collapse reads it back."""


def cases() -> Iterator[tuple[str, CollapseStep, bool]]:
    for (actor, (steps, _, _)), swapped in product(ACTORS.items(), (False, True)):
        for step in steps:
            if swapped or step is not CollapseStep.SWAPIN:
                yield actor, step, swapped


@pytest.mark.parametrize(("actor", "step", "swapped"), list(cases()))
def test_it_ends_as_the_kernels_would(actor: str, step: CollapseStep, swapped: bool) -> None:
    _, wanted, act = ACTORS[actor]
    world = World(pages=15)
    machine, mm = world.machine, world.mm
    if swapped:
        world.swap_out(1)
        wanted = ENDS_OTHERWISE.get((actor, step), wanted)
    acted = []
    world.before(step, lambda: acted.append(act(machine, mm)))
    result, _ = world.results(world.switches)
    assert acted, "the collapse came to that step"
    assert result is wanted
    machine.finish_migrations()
    assert check(machine) == []
    for number, other in machine.mms.items():
        held = [machine.read(other, START + page * PAGE) for page in range(15)]
        kept = [(outcome, content) for outcome, content in held if content]
        assert all(outcome is Fault.DONE for outcome, _ in kept), number
        assert {content for _, content in kept} <= set(range(1, 17))
        if actor not in ("munmap of it all", "MADV_DONTNEED", "mremap of it all"):
            lost = {"munmap of the first page": 1}.get(actor, 0)
            assert [content for _, content in held[lost:]] == list(range(lost + 1, 16))
    assert check(machine) == []


def test_a_process_that_exits_is_visited_no_more() -> None:
    world = World()
    world.before(CollapseStep.REVALIDATE, lambda: world.machine.exit(world.mm))
    assert world.scan() is ScanResult.ANY_PROCESS
    assert world.machine.khugepaged.mms == []
    world.machine.khugepaged.full_scan()
    assert check(world.machine) == []


def test_memory_that_fails_under_the_copy_undoes_it() -> None:
    world = World()
    world.before(CollapseStep.COPY, lambda: world.machine.parts.memory.set(world.pfn(7), Fl.POISONED))
    assert world.scan() is ScanResult.COPY_MC
    assert world.mm.pmd(START) is Pmd.TABLE
    assert world.machine.read(world.mm, START + 7 * PAGE)[0] is Fault.SIGBUS
    assert world.machine.read(world.mm, START + 6 * PAGE) == (Fault.DONE, 7)
    assert check(world.machine) == []
