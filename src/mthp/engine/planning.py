"""What `mthp plan` tells: which folios a collapse would make in an address space, and at what price.

Reads the PMD ranges of the mappings that may be collapsed, in blocks, and plans each block
(:func:`mthp.engine.plan.plan_planes`). Kept of a block is one row per PMD range and one per folio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace, Segment, Vma, VmaKind
from mthp.eligibility import Trigger, eligibility
from mthp.engine.filled import FilledPages
from mthp.engine.occupancy import Planes, planes_of
from mthp.engine.plan import make_rules, plan_planes
from mthp.engine.policy import Policy, Rules
from mthp.engine.policy_lookup import policy_named
from mthp.engine.space_plan import Folios, Ranges, SpacePlan
from mthp.geometry import Geometry
from mthp.metrics import Coverage, Measured, Scope, measure
from mthp.results import ScanResult
from mthp.segments import in_blocks
from mthp.tunables import Switches

BLOCK_PMD_RANGES = 128
"""PMD ranges read and planned at a time: 65 536 PTEs on x86-64."""

Progress = Callable[[int, int], None]
"""Told (bytes done, bytes in all) after every block."""

ORDERS_ENABLED = "enabled"
"""Value of the orders that stands for what the machine's switches allow each mapping."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What shall be planned.

    Attributes:
        policy: a policy, or its name.
        orders: the enabled orders; None for all that anonymous memory can have, ``"enabled"`` for what the
            machine's switches allow.
        trigger: ``khugepaged``, which respects the limits, or ``madvise``.
        max_ptes_none, max_ptes_swap, max_ptes_shared: limits per PMD range; the target machine's own by default.
        mthp_min_order: the seed's MTHP_MIN_ORDER, for the policy ``rfc``; 3 by default.
        include_file: plan memory of files and shared memory too, at the PMD order.
        within: plan this range of addresses only.
        filled: pages that earlier collapses filled, for policies that remember them.
    """

    policy: str | Policy = "mainline"
    orders: Iterable[int] | str | None = None
    trigger: Trigger = "khugepaged"
    max_ptes_none: int | None = None
    max_ptes_swap: int | None = None
    max_ptes_shared: int | None = None
    mthp_min_order: int | None = None
    include_file: bool = False
    within: Segment | None = None
    filled: FilledPages | None = None


def plan_space(space: AddressSpace, options: PlanOptions, progress: Progress | None = None) -> SpacePlan:
    """Plan the collapse of `space`.

    Raises:
        UsageError: as :func:`mthp.plan_ranges`.
        TargetVanishedError: the process exited meanwhile.
    """
    policy = policy_named(options.policy)
    base = base_rules(space, options)
    vmas = space.vmas()
    jobs, refused = jobs_of(space, options, base, vmas)
    parts: list[tuple[Ranges, Folios]] = []
    granule = space.geometry.pmd_size
    todo = [(job, space.populated(job.segments, granule)) for job in jobs]
    size = sum(end - start for _, segments in todo for start, end in segments)
    done = 0
    for job, segments in todo:
        for block in in_blocks(segments, BLOCK_PMD_RANGES * granule):
            parts.append(_plan_block(space, job, block, policy, options.filled))
            done += sum(end - start for start, end in block)
            if progress is not None:
                progress(done, size)
    ranges = Ranges.joined([part for part, _ in parts])
    folios = Folios.joined([part for _, part in parts])
    folios = folios[np.argsort(folios.address)]
    orders = tuple(sorted({order for job in jobs for order in job.rules.orders}))
    scope = Scope(options.within, options.include_file)
    measured = measure(space, vmas, scope, addresses=folios.address, orders=folios.order)
    eligible, refused_resident = _split(measured, vmas, refused)
    return SpacePlan(
        label=space.label,
        geometry=space.geometry,
        policy=policy.name,
        orders=orders,
        trigger=base.trigger,
        tunables=base.tunables,
        ranges=ranges[np.argsort(ranges.address)],
        folios=folios,
        refused=tuple(refused),
        planned_bytes=sum(end - start for job in jobs for start, end in job.segments),
        asked_order=_asked_order(options, base, orders),
        scope=scope,
        before=measured.now,
        after=measured.planned,
        eligible=eligible,
        refused_resident=refused_resident,
    )


def _asked_order(options: PlanOptions, base: Rules, enabled: Sequence[int]) -> int:
    """Return the order that coverage is stated for; `enabled` orders are those of all mappings together."""
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


@dataclass(frozen=True, slots=True)
class Job:
    """Mappings that are planned under the same rules: their PMD ranges, and what each mapping is."""

    rules: Rules
    segments: list[Segment]
    starts: NDArray[np.uint64]
    uffd_armed: NDArray[np.bool_]
    droppable: NDArray[np.bool_]


class Circumstances(Protocol):
    """What decides on the rules, of all who plan and collapse; the fields are those of :class:`PlanOptions`."""

    @property
    def orders(self) -> Iterable[int] | str | None: ...
    @property
    def trigger(self) -> Trigger: ...
    @property
    def max_ptes_none(self) -> int | None: ...
    @property
    def max_ptes_swap(self) -> int | None: ...
    @property
    def max_ptes_shared(self) -> int | None: ...
    @property
    def mthp_min_order(self) -> int | None: ...


def base_rules(space: AddressSpace, options: Circumstances) -> Rules:
    """The rules for anonymous memory, from `options` and what `space` says where they are silent.

    Raises:
        UsageError: as :func:`mthp.plan_ranges`.
    """
    geometry = space.geometry
    tunables = space.tunables.replaced(
        geometry,
        max_ptes_none=options.max_ptes_none,
        max_ptes_swap=options.max_ptes_swap,
        max_ptes_shared=options.max_ptes_shared,
    )
    orders = None if options.orders == ORDERS_ENABLED else options.orders
    return make_rules(
        geometry,
        orders=orders,
        trigger=options.trigger,
        tunables=tunables,
        mthp_min_order=options.mthp_min_order,
    )


def jobs_of(
    space: AddressSpace, options: PlanOptions, base: Rules, vmas: Sequence[Vma] | None = None
) -> tuple[list[Job], list[tuple[Vma, str]]]:
    """Group the mappings that may be collapsed by the rules that hold for them; name the others with the reason.

    Args:
        base: as :func:`base_rules` gives them.
        vmas: the mappings, if they were listed before.
    """
    follow_switches = options.orders == ORDERS_ENABLED
    groups: dict[Rules, list[tuple[Vma, Segment]]] = {}
    refused = []
    # Asked once, not for each mapping: a live target reads files for it.
    geometry, switches, thp_disabled = space.geometry, space.switches, space.thp_disabled
    for vma in space.vmas() if vmas is None else vmas:
        allowed = eligibility(
            vma,
            geometry,
            switches,
            trigger="khugepaged" if follow_switches else "madvise",
            thp_disabled=thp_disabled,
            include_file=options.include_file,
        )
        segment = _clipped(vma.pmd_ranges(geometry), options.within, geometry)
        if not allowed:
            if options.within is None or (vma.start < options.within[1] and options.within[0] < vma.end):
                refused.append((vma, allowed.reason))
        elif segment is not None:
            rules = _rules_for(vma, allowed.orders, base, switches, follow_switches=follow_switches)
            groups.setdefault(rules, []).append((vma, segment))
    jobs = [
        Job(
            rules,
            [segment for _, segment in members],
            np.array([vma.start for vma, _ in members], np.uint64),
            np.array([vma.uffd_armed for vma, _ in members]),
            np.array([vma.droppable for vma, _ in members]),
        )
        for rules, members in groups.items()
    ]
    return jobs, refused


def _rules_for(vma: Vma, allowed: tuple[int, ...], base: Rules, switches: Switches, *, follow_switches: bool) -> Rules:
    if vma.kind is not VmaKind.ANON:
        # The limits and the smaller orders are matters of anonymous memory.
        return Rules(base.geometry, (base.geometry.pmd_order,), "madvise", base.tunables, of_file=True)
    return switched(base, allowed, switches) if follow_switches else base


def switched(base: Rules, allowed: tuple[int, ...], switches: Switches) -> Rules:
    """The rules of a mapping whose orders are those that the machine's switches allow it."""
    always = tuple(order for order in allowed if switches.sizes.get(order) == "always")
    return replace(base, orders=allowed, always=always)


def _clipped(segment: Segment, within: Segment | None, geometry: Geometry) -> Segment | None:
    """The whole PMD ranges of `segment` that lie in `within`; None if there are none."""
    start, end = segment
    if within is not None:
        size = geometry.pmd_size
        start, end = max(start, -(-within[0] // size) * size), min(end, within[1] // size * size)
    return (start, end) if start < end else None


def read_planes(space: AddressSpace, job: Job, block: list[Segment]) -> tuple[NDArray[np.uint64], Planes]:
    """Read some PMD ranges of a job: where each begins (uint64, shape (ranges,)), and their planes.

    Raises:
        TargetVanishedError: the process is gone.
    """
    columns = space.read(block)
    geometry = space.geometry
    address = np.concatenate([np.arange(start, end, geometry.pmd_size, dtype=np.uint64) for start, end in block])
    vma = np.searchsorted(job.starts, address, side="right") - 1
    return address, planes_of(columns, geometry, uffd_armed=job.uffd_armed[vma], droppable=job.droppable[vma])


def _plan_block(
    space: AddressSpace, job: Job, block: list[Segment], policy: Policy, filled: FilledPages | None
) -> tuple[Ranges, Folios]:
    geometry = space.geometry
    address, planes = read_planes(space, job, block)
    if filled is not None and (bits := filled.of(address)) is not None:
        # What was unmapped since is no page any more.
        planes = replace(planes, filled=bits & planes.present)
    plan = plan_planes(planes, policy, job.rules)
    folios = plan.folios
    offset = folios.offset.astype(np.uint64) * np.uint64(geometry.page_size)
    ranges = Ranges(address, plan.scan_result, plan.resident, plan.copied, plan.filled)
    return (
        # Which empty ranges are read at all depends on the backend and on how full the target is.
        ranges[ranges.scan_result != ScanResult.NO_PTE_TABLE],
        Folios(address[folios.range] + offset, folios.order, folios.filled),
    )
