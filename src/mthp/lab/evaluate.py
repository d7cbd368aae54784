"""The evaluation of settings on a target, scan by scan: the numbers behind every comparison.

A scan is planned (:mod:`mthp.engine.plan`) and the plan is carried out on the planes of bits. The next scan sees the
result, until nothing changes any more.

Not modelled are other processes, allocation failures, and what the program does meanwhile, which the simulated machine
has. Here memory is that of one moment, and every attempt succeeds that the PTEs do not rule out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mthp.abilities import resident_bytes, zero_filled
from mthp.addrspace import AddressSpace
from mthp.engine.bits import Bits
from mthp.engine.planes import Planes
from mthp.engine.policy import Rules
from mthp.engine.policy_lookup import policy_named
from mthp.engine.select import Job, PlanOptions, base_rules, jobs_of, ranges_of, read_planes
from mthp.geometry import Geometry
from mthp.heat import Heat
from mthp.lab import figures
from mthp.lab.figures import Row
from mthp.lab.makers import SPLIT, Maker
from mthp.lab.scans import MAX_SCANS, Counts, RangeState, history, scan_at
from mthp.progress import Progress, ReadProgress
from mthp.ptes import Segment, in_portions
from mthp.sim.clock import Costs
from mthp.trimming import TrimBy, Trimming
from mthp.vma import Vma

PORTION_RANGES = 512
"""PMD ranges per read: 256 Ki PTEs on x86-64, so that all planes of a portion stay in the processor's caches."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The states of a target under one setting.

    Attributes:
        options: the setting.
        policy: name of the maker of folios (:mod:`mthp.lab.makers`).
        rules: the setting's rules for anonymous memory on the target's machine.
        scans: the state before the first scan, and after each.
        heated: whether accesses were observed.
    """

    options: PlanOptions
    policy: str
    rules: Rules
    scans: tuple[Counts, ...]
    heated: bool = False

    @property
    def geometry(self) -> Geometry:
        """Geometry of the machine."""
        return self.rules.geometry

    def rows(self, costs: Costs | None = None, *, tlb_entries: int = 1536, coalesced_order: int = 0) -> list[Row]:
        """Return the figures of :mod:`mthp.lab.figures` for the state before the first scan, and after each.

        Args:
            costs: costs of khugepaged's work.
            tlb_entries: entries of the last level of the TLB.
            coalesced_order: order of the largest run of PTEs in one entry.
        """
        costs = costs or Costs()
        rows: list[Row] = []
        scanned = 0
        page, pmd_order = self.geometry.page_size, self.geometry.pmd_order
        before = int(self.scans[0].by_order.sum())
        for index, now in enumerate(self.scans):
            scanned += now.scanned
            resident = int(now.by_order.sum())
            entries = figures.translations(now.by_order, now.pmd_mapped, pmd_order, coalesced_order)
            folios = int(now.folios.sum())
            row: Row = self.setting | {
                "scan": index,
                "resident_bytes": resident * page,
                "huge_coverage": figures.share(now.pmd_mapped, resident),
                "hot_coverage": now.hot if self.heated else None,
                "large_coverage": figures.coverage_from(now.by_order, 1),
                "bloat_bytes": now.filled * page,
                # Of the memory before the first scan, so that bloat is not in both parts.
                "bloat_share": figures.share(now.filled, before),
                "creep_bytes": (now.filled - self.scans[index - 1].filled) * page if index else 0,
                "given_back_bytes": now.trimmable * page,
                "copied_bytes": now.copied * page,
                "folios": folios,
                "scanned_ptes": scanned,
                "khugepaged_seconds": self._khugepaged_seconds(costs, now, scanned),
                "translations": entries,
                # The entries, times the mean bytes that one of them maps.
                "tlb_reach_bytes": figures.share(tlb_entries * resident * page, entries),
            }
            for order in range(pmd_order + 1):
                row[figures.order_column(order)] = figures.share(int(now.by_order[order]), resident)
            rows.append(row)
        return rows

    def _khugepaged_seconds(self, costs: Costs, now: Counts, scanned: int) -> float:
        page, pmd_order = self.geometry.page_size, self.geometry.pmd_order
        folios, huge = int(now.folios.sum()), int(now.folios[pmd_order])
        spent = figures.khugepaged_seconds(
            costs,
            ptes=scanned,
            ranges=scanned >> pmd_order,
            copied_bytes=now.copied * page,
            zeroed_bytes=now.filled * page,
            folios=huge + now.split if now.split else folios,
            folio_pages=now.copied + now.filled,
        )
        # A split range costs a collapse to the PMD order, and then the splits of all its pages.
        split_ps = (folios - huge) * costs.split_folio + (now.split << pmd_order) * costs.split_page
        return spent + (split_ps / 1e12 if now.split else 0.0)

    @property
    def setting(self) -> Row:
        """The columns that identify the setting."""
        tunables = self.rules.tunables
        return {
            "policy": self.policy,
            "orders": ",".join(self.geometry.label(order) for order in self.rules.orders),
            "trigger": self.rules.trigger,
            "max_ptes_none": tunables.max_ptes_none,
            "max_ptes_swap": tunables.max_ptes_swap,
            "max_ptes_shared": tunables.max_ptes_shared,
            "mthp_min_order": self.rules.mthp_min_order,
        }


def evaluate(
    space: AddressSpace,
    settings: Sequence[PlanOptions],
    *,
    scans: int | None = 1,
    contents: bool = False,
    heat: Heat | None = None,
    progress: Progress | None = None,
    portion_ranges: int = PORTION_RANGES,
) -> list[Evaluation]:
    """Take the memory of `space` through scans under each of some settings.

    Args:
        settings: what to plan; a policy may be any maker of :mod:`mthp.lab.makers`.
        scans: number of scans; None for as many as it takes until nothing changes.
        contents: also read the contents, to find pages of zeroes that the program wrote itself.
        heat: which memory is used, for the part of the accesses that go to memory that PMD entries map.
        portion_ranges: PMD ranges to read at a time.

    Returns:
        One outcome per setting. All have the same number of scans.

    Raises:
        UsageError: as :func:`mthp.plan_ranges`.
        UnsupportedError: `contents` of an address space without any.
        TargetVanishedError: the process exited in the meantime.
    """
    limit = MAX_SCANS if scans is None else scans
    # Listed once, because mappings of a live target change, and all settings must have the same.
    vmas = space.vmas()
    courses = [_Course.of(space, vmas, options, limit) for options in settings]
    todo = _reads(space, courses)
    reading = ReadProgress(progress, [segment for _, _, segments in todo for segment in segments])
    for members, index, segments in todo:
        # PMD ranges do not depend on each other. So each portion is read once, and taken through all settings and scans
        # before the next is read: memory use depends on the size of a portion, not of the target.
        for portion in in_portions(segments, portion_ranges * space.geometry.pmd_size):
            address = ranges_of(portion, space.geometry)
            # Any member's job will do: they have the same segments, and only rules differ.
            state = _read(space, members[0].jobs[index], address, contents, heat)
            for course in members:
                course.add(state, course.jobs[index].rules)
            reading.has_read(portion)
    longest = max((len(course.scans) for course in courses), default=0)
    heated = heat is not None and heat.spans > 0
    # A setting that settled earlier repeats its last state, so that all tables have the same rows.
    return [course.outcome(longest if scans is None else scans + 1, heated=heated) for course in courses]


def _reads(space: AddressSpace, courses: Sequence[_Course]) -> list[tuple[list[_Course], int, list[Segment]]]:
    """Return the reads that settings share: these settings, the index of their job, and its segments."""
    work: dict[tuple[tuple[Segment, ...], ...], list[_Course]] = {}
    for course in courses:
        # Settings that choose the same ranges share each read; others (a trigger, a size that is off) read their own.
        work.setdefault(tuple(tuple(job.segments) for job in course.jobs), []).append(course)
    return [
        (members, index, space.populated(list(segments), space.geometry.pmd_size))
        for places, members in work.items()
        for index, segments in enumerate(places)
    ]


def resident_by_splitting(space: AddressSpace, options: PlanOptions) -> int:
    """Return the most bytes of `space` that are resident after a plan was carried out by splitting.

    Contents are not read: pages of zeroes that the program wrote outside of planned folios are given back, too.

    Raises:
        UsageError: as :func:`mthp.plan_ranges`.
        TargetVanishedError: the process exited in the meantime.
    """
    by_splits = replace(options, policy=f"{policy_named(options.policy).name}{SPLIT}", heat=None)
    [outcome] = evaluate(space, [by_splits])
    before, after = (int(scan.by_order.sum()) for scan in outcome.scans)
    return resident_bytes(space) + (after - before) * space.geometry.page_size


@dataclass
class _Course:
    """The progress of one setting through the blocks."""

    options: PlanOptions
    maker: Maker
    base: Rules
    jobs: list[Job]
    limit: int
    scans: list[Counts]

    @classmethod
    def of(cls, space: AddressSpace, vmas: Sequence[Vma], options: PlanOptions, limit: int) -> _Course:
        base = base_rules(space, options)
        jobs, _ = jobs_of(space, options, base, vmas)
        return cls(options, Maker.named(options.policy), base, jobs, limit, [Counts()])

    def add(self, state: RangeState, rules: Rules) -> None:
        """Take one more portion through all scans."""
        portion = history(state, self.maker, rules, self.limit)
        # After its last scan a portion does not change, and neither does the sum.
        length = max(len(self.scans), len(portion))
        self.scans = [scan_at(self.scans, index) + scan_at(portion, index) for index in range(length)]

    def outcome(self, length: int, *, heated: bool) -> Evaluation:
        scans = tuple(scan_at(self.scans, index) for index in range(length))
        return Evaluation(self.options, self.maker.name, self.base, scans, heated)


def _read(space: AddressSpace, job: Job, address: NDArray[np.uint64], contents: bool, heat: Heat | None) -> RangeState:
    """Return the present state of the PMD ranges that are not empty."""
    by: TrimBy = next(iter(space.trims_by), "cold") if isinstance(space, Trimming) else "cold"
    columns, planes = read_planes(space, job, address)
    empty = zero_filled(space, columns).reshape(planes.present.shape) if contents else None
    hot = _shares(heat, address, space.geometry.pmd_size)
    some = _with_pages(planes)
    if some.all():
        return RangeState(planes, empty, hot, by)
    return RangeState(planes.chosen(some), None if empty is None else empty[some], hot[some], by)


def _with_pages(planes: Planes) -> Bits:
    """Return the PMD ranges in which anything is mapped or swapped out: bool, shape (ranges,)."""
    # Which empty ranges are read depends on the backend, so none count.
    some: Bits = np.logical_or.reduce(planes.present, axis=1)
    if planes.swap is not None:
        some |= np.logical_or.reduce(planes.swap, axis=1)
    return some


def _shares(heat: Heat | None, address: NDArray[np.uint64], size: int) -> NDArray[np.float64]:
    """Return the part of all accesses that go to each PMD range: float64, shape (ranges,); 0.0 without heat."""
    if heat is None or not heat.spans:
        return np.zeros(len(address))
    return heat.within(address, address + np.uint64(size)) / heat.total
