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
        memory: of all nodes together.
        nodes: NUMA nodes.
        swap: the size of the swap device.
        geometry: page size and PMD order, by the name of a kernel's.
        fragmentation: the part of the free memory that cannot be had in blocks of the PMD order, at the start.
        movable: the part of the pages that are in the way which compaction can move.
    """

    memory: Size = 1 << 30
    nodes: Annotated[int, whole(1)] = 1
    swap: SizeOrNone = 0
    geometry: Annotated[str, one_of(*GEOMETRIES)] = "x86-64"
    fragmentation: Share = 0.0
    movable: Share = 0.0


@dataclass(frozen=True)
class ProcessSettings:
    """A table ``[[process]]``, without what is the model's own.

    Attributes:
        workload: the model.
        name: in the results; the workload's by default.
        count: how many of them.
        start: when they begin.
        stop: when they end; 0 for at the end.
        advise: whether their memory carries MADV_HUGEPAGE.
        advise_after: how long after its start a process asks for that; until then its memory is faulted in small, and
            what becomes large is khugepaged's doing.
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
    """A table ``[[fault]]``: something that goes wrong.

    Attributes:
        at: when.
        kind: ``fragment``: free memory is fragmented to `share`; ``kill``: processes called `process` die; ``pin``: for
            `lasts`, `share` of their pages are pinned, as I/O does; ``limit``: the cgroup of each gets `size` as its
            limit.
        process: name of the processes.
        share: of the free memory to fragment, or of the pages to pin.
        size: the new limit; 0 for none.
        lasts: how long pages are pinned.
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
        every: from one trim to the next.
        start: no trim before that.
        zero: the part of a folio's pages that must hold nothing but zeroes.
        free: a trim only while less than this part of the machine's memory is free.
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
class Settings:
    """What stands above all tables.

    Attributes:
        duration: how long it runs.
        seed: of all chance.
        policy: what khugepaged collapses to; with ``:split`` behind it, what mthp collapses to by splitting, while
            khugepaged rests.
        step: from one tick of the programs to the next.
        sample: from one row of the results to the next.
        khugepaged: whether it runs, or mthp in its place.
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
        path: of the file.
        text: its contents.
        settings, machine, processes, faults: its tables.
        trim: its table of that name; None without one.
        geometry, switches, tunables: of the machine.
    """

    path: str
    text: str
    settings: Settings
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
