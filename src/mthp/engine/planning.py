"""The plan of an address space, as `mthp plan` prints it: the folios that a collapse would make, and their price.

It reads the PMD ranges of the mappings that may be collapsed, in blocks, and plans each block
(:func:`mthp.engine.plan.plan_planes`). It keeps one row per PMD range and one per folio.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from mthp.abilities import heat_of
from mthp.addrspace import AddressSpace
from mthp.blockstates import states_of
from mthp.engine.filled import FilledPages
from mthp.engine.plan import plan_planes
from mthp.engine.policy import Policy, Rules
from mthp.engine.policy_lookup import policy_named
from mthp.engine.select import (
    ORDERS_ENABLED,
    PORTION_PMD_RANGES,
    Job,
    PlanOptions,
    base_rules,
    jobs_of,
    portions_of,
    ranges_of,
    read_parts,
    read_planes,
)
from mthp.engine.space_plan import Folios, Ranges, SpacePlan
from mthp.measuring import Measured, Meter, Scope, measure
from mthp.metrics import Coverage
from mthp.progress import Progress, ReadProgress
from mthp.ptes import PteColumns, Segment, bytes_in, segments_of, without
from mthp.results import ScanResult
from mthp.vma import Vma


def plan_space(
    space: AddressSpace,
    options: PlanOptions,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
    *,
    portion_ranges: int = PORTION_PMD_RANGES,
) -> SpacePlan:
    """Plan the collapse of `space`.

    Args:
        stop: called while heat is measured; once it returns True the plan uses the heat seen until then.
        portion_ranges: most PMD ranges to read and plan at a time.

    Raises:
        UsageError: as :func:`mthp.plan_ranges`.
        TargetVanishedError: the process exited in the meantime.
        UnsupportedError, NotPermittedError: as :func:`mthp.abilities.heat_of`.
    """
    policy, base = policy_named(options.policy), base_rules(space, options)
    # First, because the program may run for seconds while its accesses are measured.
    heat = heat_of(space, options.heat, stop)
    vmas = space.vmas()
    jobs, refused = jobs_of(space, options, base, vmas)
    scope = Scope(options.within, options.include_file)
    meter = Meter(space, vmas, scope)
    ranges, folios = _plan_and_measure(space, jobs, policy, options.filled, meter, progress, portion_ranges)
    orders = tuple(sorted({order for job in jobs for order in job.rules.orders}))
    measured = meter.measured()
    eligible, refused_resident = _split(measured, vmas, refused)
    return SpacePlan(
        label=space.label,
        geometry=space.geometry,
        policy=policy.name,
        orders=orders,
        trigger=base.trigger,
        tunables=base.tunables,
        ranges=ranges,
        folios=folios,
        refused=tuple(refused),
        planned_bytes=sum(bytes_in(job.segments) for job in jobs),
        coverage_order=_coverage_order(options, base, orders),
        scope=scope,
        before=measured.now,
        after=measured.planned,
        eligible=eligible,
        refused_resident=refused_resident,
        heat=heat,
        small=options.small,
    )


def _plan_and_measure(
    space: AddressSpace,
    jobs: Sequence[Job],
    policy: Policy,
    filled: FilledPages | None,
    meter: Meter,
    progress: Progress | None,
    portion_ranges: int,
) -> tuple[Ranges, Folios]:
    """Read every entry once, for the plan and for `meter`; return the planned ranges and folios."""
    todo = [(job, space.populated(job.segments, space.geometry.pmd_size)) for job in jobs]
    planned = sorted(segment for _, segments in todo for segment in segments)
    # Memory that counts for the coverage, and that no job reads.
    others = list(without(meter.segments, planned))
    reading = ReadProgress(progress, [*planned, *others])
    parts: list[tuple[Ranges, Folios]] = []
    for job, segments in todo:
        for portion in portions_of(job, segments, space.geometry, portion_ranges):
            columns, ranges, folios = _plan_portion(space, job, portion, policy, filled)
            parts.append((ranges, folios))
            meter.expect(folios.address, folios.order)
            meter.add(columns)
            reading.has_read(portion)
    meter.expect(np.empty(0, np.uint64), np.empty(0, np.int8))
    for portion in meter.portions(others):
        meter.add(space.read(portion))
        reading.has_read(portion)
    ranges = Ranges.joined([part for part, _ in parts])
    folios = Folios.joined([part for _, part in parts])
    # Jobs group mappings by rules, not by address.
    return ranges[np.argsort(ranges.address)], folios[np.argsort(folios.address)]


def _coverage_order(options: PlanOptions, base: Rules, enabled: Sequence[int]) -> int:
    """Return the order that coverage is stated for; `enabled` are the orders of all mappings together."""
    if options.orders is None:
        return base.geometry.pmd_order
    return min(enabled if options.orders == ORDERS_ENABLED else base.orders, default=base.geometry.pmd_order)


def _split(
    measured: Measured, vmas: Sequence[Vma], refused: Sequence[tuple[Vma, str]]
) -> tuple[Coverage, tuple[int, ...]]:
    """Return the coverage of the eligible mappings, and the resident pages of each refused one."""
    by_start = {vma.start: coverage for vma, coverage in zip(vmas, measured.by_vma, strict=True)}
    resident = tuple(by_start.pop(vma.start).resident for vma, _ in refused)
    return Coverage.total(list(by_start.values())), resident


def _plan_portion(
    space: AddressSpace, job: Job, portion: list[Segment], policy: Policy, filled: FilledPages | None
) -> tuple[PteColumns, Ranges, Folios]:
    """Return the entries of some PMD ranges or parts, a row for each that has a page table, and one for each folio."""
    geometry = space.geometry
    starts = np.array([start for start, _ in portion], np.uint64) if job.small else ranges_of(portion, geometry)
    columns, planes = read_parts(space, job, portion) if job.small else read_planes(space, job, starts)
    address = starts // np.uint64(geometry.pmd_size) * np.uint64(geometry.pmd_size)
    if filled is not None and (bits := filled.of(address)) is not None:
        # A page that was unmapped since is not filled any more.
        planes = replace(planes, filled=bits & planes.present)
    plan = plan_planes(planes, policy, job.rules)
    folios = plan.folios
    offset = folios.offset.astype(np.uint64) * np.uint64(geometry.page_size)
    ranges = Ranges(starts, plan.scan_result, plan.resident, plan.copied, plan.filled)
    return (
        columns,
        # Which empty ranges are read at all depends on the backend and on how full the target is, so none are kept.
        ranges[ranges.scan_result != ScanResult.NO_PTE_TABLE],
        Folios(address[folios.range] + offset, folios.order, folios.filled),
    )


def plan_parts(space: AddressSpace, options: PlanOptions) -> Folios:
    """Return the planned folios outside of whole PMD ranges of their mapping, by ascending address.

    No other memory is read. `small` of `options` is taken as set.

    Raises:
        UsageError: as :func:`mthp.plan_ranges`.
        TargetVanishedError: the process exited in the meantime.
    """
    options = replace(options, small=True)
    policy, base = policy_named(options.policy), base_rules(space, options)
    jobs, _ = jobs_of(space, options, base)
    portions = (
        (job, portion)
        for job in jobs
        if job.small
        for portion in portions_of(job, space.populated(job.segments, space.geometry.pmd_size), space.geometry)
    )
    folios = Folios.joined([_plan_portion(space, job, portion, policy, options.filled)[2] for job, portion in portions])
    return folios[np.argsort(folios.address)]


def plan_blocks(space: AddressSpace, start: int, end: int, order: int) -> SpacePlan:
    """Return the plan that makes one folio of every aligned block of `order` with contents between two addresses.

    It has no rows for PMD ranges.

    Raises:
        UsageError: the order does not exist.
    """
    geometry = space.geometry
    size = geometry.size_of(geometry.check_order(order))
    addresses = range(-(-start // size) * size, end // size * size, size)
    at_a_time = max(1, PORTION_PMD_RANGES * geometry.pmd_size // size)
    parts = []
    for first in range(0, len(addresses), at_a_time):
        chosen = addresses[first : first + at_a_time]
        blocks = [(address, order) for address in chosen]
        contents = states_of(space.read(segments_of(blocks, geometry.page_size)), blocks, geometry).contents
        filled = ((1 << order) - contents).astype(np.int32)
        folios = Folios(np.array(chosen, np.uint64), np.full(len(chosen), order, np.int8), filled)
        parts.append(folios[contents > 0])
    folios = Folios.joined(parts)
    scope = Scope((start, end), files=True)
    measured = measure(space, space.vmas(), scope, addresses=folios.address, orders=folios.order)
    return SpacePlan(
        label=space.label,
        geometry=geometry,
        policy="every block",
        orders=(order,),
        trigger="madvise",
        tunables=space.tunables,
        ranges=Ranges.joined([]),
        folios=folios,
        refused=(),
        planned_bytes=len(addresses) * size,
        coverage_order=order,
        scope=scope,
        before=measured.now,
        after=measured.planned,
        eligible=measured.now,
    )
