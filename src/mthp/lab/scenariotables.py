"""The tables of a scenario: each is a dataclass, and a key of the file is one of its fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from mthp.geometry import GEOMETRIES, Geometry
from mthp.lab.makers import known_maker
from mthp.lab.workloads import MODELS
from mthp.lab.workloads.parameters import Count, Duration, Period, Share, Size, SizeOrNone
from mthp.lab.workloads.program import Model
from mthp.toml import one_of, positive, whole
from mthp.tunables import Switches, Tunables
from mthp.units import parse_share


@dataclass(frozen=True)
class MachineSettings:
    """The table ``[machine]``.

    Attributes:
        memory: bytes of all nodes together.
        nodes: number of NUMA nodes.
        swap: bytes of the swap device.
        geometry: page size and PMD order, by the name of a kernel's geometry.
        fragmentation: the part of the free memory that is not available in blocks of the PMD order, at the start.
        movable: the part of the pages in the way that compaction can move.
    """

    memory: Size = 1 << 30
    nodes: Annotated[int, whole(1)] = 1
    swap: SizeOrNone = 0
    geometry: Annotated[str, one_of(*GEOMETRIES)] = "x86-64"
    fragmentation: Share = 0.0
    movable: Share = 0.0


@dataclass(frozen=True)
class ProcessSettings:
    """A table ``[[process]]``, without the keys of its model.

    Attributes:
        workload: the model.
        name: name in the results; by default the workload's.
        count: number of processes.
        start: time at which they begin.
        stop: time at which they end; 0 for at the end.
        advise: whether their memory has MADV_HUGEPAGE.
        advise_after: time from a process's start to its MADV_HUGEPAGE; until then its memory is faulted in small, and
            only khugepaged makes it large.
        limit: ``memory.max`` of a cgroup of its own, for each of them; 0 for none.
    """

    workload: Annotated[str, one_of(*MODELS)]
    name: str = ""
    count: Count = 1
    start: Duration = 0.0
    stop: Duration = 0.0
    advise: bool = True
    advise_after: Duration = 0.0
    limit: SizeOrNone = 0


@dataclass(frozen=True)
class FaultSettings:
    """A table ``[[fault]]``: a disturbance.

    Attributes:
        at: time of the fault.
        kind: ``fragment``: free memory is fragmented to `share`; ``kill``: processes called `process` die; ``pin``: for
            `lasts`, `share` of their pages are pinned, as by I/O; ``limit``: the cgroup of each gets the limit `size`.
        process: name of the processes.
        share: part of the free memory to fragment, or of the pages to pin.
        size: the new limit; 0 for none.
        lasts: time for which pages are pinned.
    """

    at: Duration
    kind: Literal["fragment", "kill", "pin", "limit"]
    process: str = ""
    share: Share = 0.5
    size: SizeOrNone = 0
    lasts: Duration = 5.0


@dataclass(frozen=True)
class TrimSettings:
    """The table ``[trim]``: mthp gives back pages of zeroes of all processes.

    Attributes:
        every: time from the beginning of one trim to that of the next.
        start: time of the earliest trim.
        zero: the part of a folio's pages that must contain only zeroes.
        free: trim only while less than this part of the machine's memory is free.
    """

    every: Period
    start: Duration = 0.0
    zero: Annotated[float, positive(parse_share)] = 0.5
    free: Share = 1.0


@dataclass(frozen=True)
class ProcessPlan:
    """Processes of one model: the settings, and the model with its parameters."""

    settings: ProcessSettings
    model: Model


@dataclass(frozen=True)
class TopLevelKeys:
    """The keys above all tables.

    Attributes:
        duration: simulated time of the run.
        seed: seed of all random numbers.
        policy: policy of khugepaged; with the suffix ``:split``, policy of mthp, which splits while khugepaged rests.
        step: time from one tick of the programs to the next.
        sample: time from one row of the results to the next.
        khugepaged: whether khugepaged runs, or mthp in its place.
    """

    duration: Period
    seed: Count = 0
    policy: Annotated[str, known_maker] = "mainline"
    step: Period = 0.1
    sample: Period = 1.0
    khugepaged: bool = True


@dataclass(frozen=True)
class Scenario:
    """A scenario, checked.

    Attributes:
        path: path of the file.
        text: its contents.
        settings, machine, processes, faults: its tables.
        trim: its table of that name; None without one.
        geometry, switches, tunables: those of the machine.
    """

    path: str
    text: str
    settings: TopLevelKeys
    machine: MachineSettings
    processes: tuple[ProcessPlan, ...]
    faults: tuple[FaultSettings, ...]
    geometry: Geometry
    switches: Switches = field(default_factory=Switches)
    tunables: Tunables | None = None
    trim: TrimSettings | None = None

    @property
    def name(self) -> str:
        """The name of the file."""
        return Path(self.path).name
