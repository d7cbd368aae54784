"""Bounds on a scenario: what its simulation takes of this machine, checked before it begins."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

from mthp.bounded import Bound
from mthp.errors import UsageError
from mthp.geometry import Geometry
from mthp.lab.scenariotables import MachineSettings, ProcessPlan, TopLevelKeys, TrimSettings
from mthp.units import format_size

BYTES_PER_PAGE = 20
"""Approximate bytes that the simulation takes for each page of the simulated machine."""

BYTES_PER_PTE = 6
"""Approximate bytes that it takes for each page that a program maps, touched or not."""

PROCESSES = Bound(1 << 12, "processes")
"""The most processes. A simulated machine has room for 32 766 address spaces, and each process may fork some."""

ROWS = Bound(1 << 18, "rows of results")
"""The most rows: one for each sample of each process, and one for all together, of some 2 KiB each."""

COUNT = Bound(1 << 12, "workers, batches or the like of a workload")
"""The most of each count of a workload. Each is a process, or an action in every simulated second."""

TRIMS = Bound(1 << 16, "trims")
"""The most trims. Each reads the large folios of all processes."""

NODES = Bound(1 << 10, "nodes")
"""The most nodes: MAX_NUMNODES (include/linux/numa.h) is 1 << NODES_SHIFT, and x86-64 has at most 10."""

LONGEST_STEP = 10.0
"""Seconds between ticks of programs, at most: in between nothing else happens, Ctrl-C included."""

TIMES_ITS_MACHINE = 64
"""A size of a workload may be this many times the machine's memory and swap, because it may be mapped untouched, or
allocated in a second."""


def check_machine(machine: MachineSettings, geometry: Geometry) -> None:
    """Refuse a machine if its simulation does not fit into the memory of this one.

    Raises:
        UsageError: it is too large, or has too many nodes.
    """
    NODES.check(machine.nodes)
    _check_memory("memory", machine, (machine.memory + machine.swap) // geometry.page_size * BYTES_PER_PAGE)


def _check_memory(place: str, machine: MachineSettings, needed: int) -> None:
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there // 2:
        raise UsageError(
            f"{place}: simulating {format_size(machine.memory + machine.swap)} with swap needs about"
            f" {format_size(needed)} of memory here, but this machine has {format_size(there)}",
            help="simulate a smaller machine, or larger pages (machine.geometry)",
        )


def check_trims(trim: TrimSettings | None, settings: TopLevelKeys) -> None:
    """Refuse more trims than can be simulated.

    Raises:
        UsageError: there are too many.
    """
    if trim is not None:
        TRIMS.check(int(settings.duration / trim.every))


def check_processes(
    processes: Sequence[ProcessPlan], machine: MachineSettings, settings: TopLevelKeys, geometry: Geometry
) -> None:
    """Refuse processes if they are too many, map too much, or their results would take too much memory.

    Raises:
        UsageError: one of these.
    """
    if settings.step > LONGEST_STEP:
        raise UsageError(
            f"step is longer than {LONGEST_STEP:g}s", help="programs act once in a step: the default is 100ms"
        )
    count = sum(process.settings.count for process in processes)
    PROCESSES.check(count)
    ROWS.check(int((settings.duration / settings.sample + 2) * (count + 1)))
    room, mapped = machine.memory + machine.swap, 0
    for number, process in enumerate(processes, 1):
        # Durations and shares are floats: whole numbers are sizes, or counts.
        for name, value in _whole_numbers(process.model):
            if name in _COUNTED:
                COUNT.check(value)
            elif value > TIMES_ITS_MACHINE * room:
                raise UsageError(
                    f"process {number}.{name}: {format_size(value)} is more than {TIMES_ITS_MACHINE} times the"
                    f" memory of the machine, {format_size(room)} with swap",
                    help="add memory or swap to the machine, or reduce the workload",
                )
        # Only the sparse arena has it. Mappings of a recording have a bound of their own (Replay._segments).
        reserve = getattr(process.model, "reserve", 0)
        mapped += reserve * process.settings.count
    _check_memory("process.reserve", machine, mapped // geometry.page_size * BYTES_PER_PTE)
    _check_room(processes, machine)


_COUNTED = ("workers", "batches", "prefetch")


def _whole_numbers(model: Any) -> list[tuple[str, int]]:
    values = ((field.name, getattr(model, field.name)) for field in dataclasses.fields(model))
    # In Python, a bool is an int.
    return [(name, value) for name, value in values if isinstance(value, int) and not isinstance(value, bool)]


def _check_room(processes: Sequence[ProcessPlan], machine: MachineSettings) -> None:
    """Refuse processes that cannot fit, because the kernel would only kill them."""
    wanted = 0
    for process in processes:
        most = process.model.most * process.settings.count
        # A process with a limit never has more resident than that.
        wanted += min(most, process.settings.limit * process.settings.count or most)
    room = machine.memory + machine.swap
    if wanted > room:
        raise UsageError(
            f"the processes need {_size(wanted)} at their peak, but the machine has {_size(room)} with swap",
            help="add memory or swap to the machine, or reduce the processes",
        )


def _size(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
