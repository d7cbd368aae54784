"""The same calls lead to the same machine, to the last counter, in this process, in another, on any machine."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np

from mthp.geometry import Geometry
from mthp.sim import Machine
from mthp.sim.address_space.mremap import Remap
from mthp.sim.allocation.fragment import random_numbers
from mthp.sim.clock import Costs
from mthp.sim.mm import HUGEPAGE
from mthp.tunables import Switches, Tunables
from simcheck import check

SMALL = Geometry("16-ptes", 4096, 4)
START, SIZE, PAGE = SMALL.pmd_size, SMALL.pmd_size, SMALL.page_size

DIGEST = "742b652b18b9747e27b3a85f7ec6efe9"
"""Checksum of the run below. A change of the model may change it, if that is intended; another machine must not."""


def lived(seed: int = 7) -> str:
    """Run operations of every kind, and return the checksum of the machine."""
    machine = Machine(
        SMALL,
        node_frames=[1024, 1024],
        swap_slots=200,
        switches=Switches("madvise", {2: "always", 3: "madvise", 4: "inherit"}),
        tunables=Tunables(3, 4, 8, 64),
        costs=Costs(**{cost.name: 1000 + number for number, cost in enumerate(dataclasses.fields(Costs))}),
    )
    machine.fragment(0.8, 4, movable=0.5, seed=seed)
    machine.sysfs.write("/proc/sys/vm/min_free_kbytes", "256")
    mm = machine.create_mm(machine.parts.memory.cgroups.create(700))
    machine.map(mm, START, START + 80 * SIZE, flags={HUGEPAGE})
    pages = random_numbers(np.arange(3000, dtype=np.int64), seed) % np.uint64(80 * 16)
    machine.touch(mm, START + pages.astype(np.int64) * PAGE)
    child = machine.fork(mm)
    machine.madvise(mm, START, START + 8 * SIZE, "FREE")
    machine.madvise(mm, START + 8 * SIZE, START + 16 * SIZE, "PAGEOUT")
    machine.mlock(mm, START + 20 * SIZE, START + 21 * SIZE)
    machine.mremap(mm, START + 30 * SIZE, START + 33 * SIZE, 3 * SIZE, Remap.MAYMOVE | Remap.DONTUNMAP)
    machine.touch(child, START + pages[:500].astype(np.int64) * PAGE)
    machine.khugepaged.full_scan()
    machine.sysfs.write("/proc/sys/vm/compact_memory", "1")
    machine.exit(child)
    machine.khugepaged.full_scan()
    assert check(machine) == []
    return machine.digest()


def test_twice_in_one_process() -> None:
    assert lived() == lived()


def test_the_seed_counts() -> None:
    assert lived(7) != lived(8)


def test_in_another_process() -> None:
    """Where strings hash differently."""
    code = "import sys; sys.path[:0] = sys.argv[1:]; import test_sim_same; print(test_sim_same.lived())"
    command = [sys.executable, "-c", code, *map(str, Path(__file__).parents[:3])]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() == lived()


def test_on_any_machine() -> None:
    assert lived() == DIGEST
