"""The main job, end to end: inspect, plan, collapse, inspect again, and how much faster it got.

The story is told of a process that the demo starts itself (:mod:`mthp.demo.workload`). Where these rights do not
allow to collapse another process, the workload collapses itself. Where this machine does not allow even that, the
story ends with the plans, and is told of the snapshot that comes with the package.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import resources
from typing import ClassVar

from mthp.addrspace import AddressSpace
from mthp.demo.client import Deed, Measurement, Verification, Workload, WorkloadStats, fit_size
from mthp.engine.census import Census, take_census
from mthp.engine.collapse import collapse_space
from mthp.engine.planning import plan_space
from mthp.engine.policy import BUILT_IN, OWN
from mthp.engine.select import PlanOptions
from mthp.engine.space_plan import SpacePlan
from mthp.errors import MthpError, NotPermittedError, UnsupportedError

DEFAULT_SIZE = 1 << 30
"""Bytes of memory that the workload grows to, where there is room."""

MEASUREMENTS = 5
"""How often the speed is measured before, and after."""

EXAMPLE = "example.parquet"
"""The snapshot that comes with the package: the workload at 256 MiB, its anonymous mappings only."""

Progress = Callable[[str, int, int], None]
"""Told (what is being done, done, in all)."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Random lookups a second, measured some times.

    Attributes:
        median: of the measurements' own medians.
        low, high: the lowest lower and the highest upper quartile of any of them.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, measurements: list[Measurement]) -> Speed:
        """Summarise `measurements`."""
        return cls(
            statistics.median(one.lookups_per_s for one in measurements),
            min(one.low for one in measurements),
            max(one.high for one in measurements),
        )


@dataclass(frozen=True, slots=True)
class Moment:
    """The workload at one moment: what memory it has, how fast it is, and what its data reads as."""

    JSON: ClassVar = (
        "speed stats verification anonymous_pages_by_order=census.anonymous.by_order"
        " anonymous_pmd_mapped_pages=census.anonymous.pmd_mapped"
    )

    census: Census
    stats: WorkloadStats
    speed: Speed
    verification: Verification


@dataclass
class Story:
    """What the demo shows.

    Attributes:
        target: name of the process, or of the snapshot.
        census: the first inspection.
        plans: one for each policy and limit that is shown side by side.
        before, after: the workload before and after the collapse; None where there was none.
        deed: what the collapse did; None where there was none.
        notes: what could not be done the usual way, and why.
    """

    JSON: ClassVar = "target inspect=census plans before collapse=deed after speedup intact notes"

    target: str
    census: Census
    plans: list[SpacePlan]
    before: Moment | None = None
    after: Moment | None = None
    deed: Deed | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def speedup(self) -> float | None:
        """Speed after over speed before; None where nothing was collapsed."""
        if self.before is None or self.after is None:
            return None
        return self.after.speed.median / self.before.speed.median

    @property
    def intact(self) -> bool:
        """Whether every byte of the workload's data reads as before."""
        if self.before is None or self.after is None:
            return True
        return self.after.verification == self.before.verification and self.after.verification.intact


def tell(size: int, seconds: float, progress: Progress) -> Story:
    """Run the whole story.

    Args:
        size: bytes of memory for the workload, or less where memory is scarce.
        seconds: how long each measurement takes.
        progress: told what is going on.

    Raises:
        MthpError: neither a process nor the snapshot can be shown.
    """
    try:
        return _of_a_process(size, seconds, progress)
    except (UnsupportedError, NotPermittedError) as error:
        story = _of_the_example(progress)
        story.notes.append(f"no live process can be shown here: {error.message}; this is the snapshot in the package")
        if error.help:
            story.notes.append(error.help)
        return story


def _of_a_process(size: int, seconds: float, progress: Progress) -> Story:
    # Imported here: it can be had on Linux only, and the snapshot can be shown elsewhere.
    from mthp.linux.live import open_live

    fitting = fit_size(size)
    with Workload() as workload:
        workload.start(fitting, lambda done, total, phase: progress(f"workload: {phase}", done, total))
        with open_live(workload.pid) as space:
            before = _look(workload, space, seconds, progress, "before")
            story = Story(space.label, before.census, _plans(space, progress), before=before)
            story.deed = _collapse(workload, space, progress)
            story.after = _look(workload, space, seconds, progress, "after")
            story.notes += space.missing
    if fitting < size:
        story.notes.append(f"memory is scarce: the workload has {fitting >> 20} MiB instead of {size >> 20} MiB")
    if story.deed.by == "itself":
        story.notes.append(
            "these rights do not allow to collapse another process (it takes CAP_SYS_NICE and CAP_SYS_PTRACE),"
            " so the workload collapsed itself"
        )
    return story


def _look(workload: Workload, space: AddressSpace, seconds: float, progress: Progress, when: str) -> Moment:
    measurements = []
    for number in range(MEASUREMENTS):
        progress(f"measuring {when}", number, MEASUREMENTS)
        measurements.append(workload.measure(seconds))
    progress(f"measuring {when}", MEASUREMENTS, MEASUREMENTS)
    progress(f"reading all data {when}", 0, 1)
    verification = workload.verify()
    census = take_census(space, lambda done, total: progress(f"inspecting {when}", done, total))
    return Moment(census, workload.stats(), Speed.of(measurements), verification)


def _plans(space: AddressSpace, progress: Progress) -> list[SpacePlan]:
    """A plan by every policy, with the system's limit of empty pages and with one eighth of a PMD range."""
    limits = (space.tunables.max_ptes_none, space.geometry.ptes_per_pmd // 8)
    chosen = [
        PlanOptions(policy=name, max_ptes_none=limit) for limit in dict.fromkeys(limits) for name in BUILT_IN | OWN
    ]
    plans = []
    for number, options in enumerate(chosen):
        progress("planning", number, len(chosen))
        plans.append(plan_space(space, options))
    progress("planning", len(chosen), len(chosen))
    return plans


def _collapse(workload: Workload, space: AddressSpace, progress: Progress) -> Deed:
    try:
        report = collapse_space(
            space, PlanOptions(), progress=lambda done, total, _: progress("collapsing", done, total)
        )
    except NotPermittedError:
        progress("collapsing", 0, 1)
        return workload.collapse_itself()
    return Deed.of(report, by="mthp")


def _of_the_example(progress: Progress) -> Story:
    """The story without a collapse, on the snapshot that comes with the package.

    Raises:
        MthpError: it cannot be read; UnsupportedError without pyarrow.
    """
    from mthp.snapshot import load

    with resources.as_file(resources.files("mthp.demo").joinpath(EXAMPLE)) as path:
        if not path.exists():
            raise MthpError(f"the package lacks its snapshot {EXAMPLE}", help="install mthp again")
        with load(path) as space:
            census = take_census(space, lambda done, total: progress("inspecting", done, total))
            return Story(space.label, census, _plans(space, progress))
