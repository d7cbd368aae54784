"""What `mthp plan` tells: which folios a collapse would make in an address space, and at what price.

Reads the PMD ranges of the mappings that may be collapsed, in blocks, and plans each block
(:func:`mthp.collapse.plan.plan_planes`). Kept of a block is one row per PMD range and one per folio.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace, Segment, Vma, VmaKind
from mthp.collapse.filled import FilledPages
from mthp.collapse.occupancy import Planes, planes_of
from mthp.collapse.plan import make_rules, plan_planes
from mthp.collapse.policy import Policy, Rules, policy_named
from mthp.columns import Table
from mthp.eligibility import Trigger, eligibility
from mthp.geometry import Geometry
from mthp.results import ScanResult
from mthp.segments import in_blocks
from mthp.tunables import Tunables

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


@dataclass(frozen=True)
class Ranges(Table):
    """The PMD ranges that were looked at, as columns; rows are by ascending address.

    Attributes:
        address: uint64.
        scan_result: int8, :class:`~mthp.results.ScanResult`.
        resident: int32, pages with contents now.
        copied: int32, pages with contents that would be copied.
        filled: int32, PTEs without contents that would become memory: bloat.
    """

    DTYPES = (np.uint64, np.int8, np.int32, np.int32, np.int32)

    address: NDArray[np.uint64]
    scan_result: NDArray[np.int8]
    resident: NDArray[np.int32]
    copied: NDArray[np.int32]
    filled: NDArray[np.int32]


@dataclass(frozen=True)
class Folios(Table):
    """The folios that would be made, as columns; rows are by ascending address.

    Attributes:
        address: uint64.
        order: int8.
        filled: int32, PTEs without contents in it.
    """

    DTYPES = (np.uint64, np.int8, np.int32)

    address: NDArray[np.uint64]
    order: NDArray[np.int8]
    filled: NDArray[np.int32]


@dataclass(frozen=True)
class SpacePlan:
    """What a collapse would make of an address space.

    Attributes:
        label: the target's name.
        geometry: of its machine.
        policy: the policy's name.
        orders: the orders that were enabled for any mapping.
        trigger, tunables: what the plan was made for.
        ranges: the PMD ranges that hold anything.
        folios: the folios that would be made.
        refused: mappings that are left alone, each with the reason; only those in `within` if that was given.
        planned_bytes: size of the PMD ranges of the mappings that were planned.
    """

    label: str
    geometry: Geometry
    policy: str
    orders: tuple[int, ...]
    trigger: Trigger
    tunables: Tunables
    ranges: Ranges
    folios: Folios
    refused: tuple[tuple[Vma, str], ...]
    planned_bytes: int

    @cached_property
    def folios_by_order(self) -> dict[int, int]:
        """How many folios of which order would be made, the largest order first."""
        counts = np.bincount(self.folios.order, minlength=1)
        return {int(order): int(counts[order]) for order in np.flatnonzero(counts)[::-1]}

    @cached_property
    def ranges_by_result(self) -> dict[ScanResult, int]:
        """How many PMD ranges have which outcome, the most frequent first."""
        counts = np.bincount(self.ranges.scan_result, minlength=len(ScanResult))
        return {ScanResult(index): int(counts[index]) for index in np.argsort(-counts, kind="stable") if counts[index]}

    @property
    def copied_bytes(self) -> int:
        """Bytes that would be copied."""
        return int(self.ranges.copied.sum(dtype=np.int64)) * self.geometry.page_size

    @property
    def filled_bytes(self) -> int:
        """Bytes that resident memory would grow by: the bloat."""
        return int(self.ranges.filled.sum(dtype=np.int64)) * self.geometry.page_size

    @property
    def coverage(self) -> float:
        """The share of the planned ranges' resident memory that PMD entries map now; 0.0 if nothing is resident."""
        return self._share(self.ranges.scan_result == ScanResult.PMD_MAPPED, self.ranges.resident)

    @property
    def coverage_after(self) -> float:
        """The same once the plan is carried out; pages that smaller folios read back from swap are not counted."""
        ranges, geometry = self.ranges, self.geometry
        made = np.isin(ranges.address, self.folios.address[self.folios.order == geometry.pmd_order])
        # A range that becomes one folio is resident throughout: what was swapped out is read back.
        resident = np.where(made, geometry.ptes_per_pmd, ranges.resident + ranges.filled)
        return self._share(made | (ranges.scan_result == ScanResult.PMD_MAPPED), resident)

    @staticmethod
    def _share(mapped: NDArray[np.bool_], resident: NDArray[np.integer]) -> float:
        """The part of `resident`, pages per range, that lies in the ranges that are `mapped`."""
        pages = int(resident.sum(dtype=np.int64))
        return int(resident[mapped].sum(dtype=np.int64)) / pages if pages else 0.0

    @property
    def refused_by_reason(self) -> dict[str, tuple[int, int]]:
        """(mappings, bytes) that are left alone, by reason, the largest first."""
        by_reason: dict[str, tuple[int, int]] = {}
        for vma, reason in self.refused:
            mappings, size = by_reason.get(reason, (0, 0))
            by_reason[reason] = mappings + 1, size + vma.size
        return dict(sorted(by_reason.items(), key=lambda item: -item[1][1]))


def plan_space(space: AddressSpace, options: PlanOptions, progress: Progress | None = None) -> SpacePlan:
    """Plan the collapse of `space`.

    Raises:
        UsageError: as :func:`mthp.plan_ranges`.
        TargetVanishedError: the process exited meanwhile.
    """
    policy = policy_named(options.policy)
    base = base_rules(space, options)
    jobs, refused = jobs_of(space, options, base)
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
    return SpacePlan(
        label=space.label,
        geometry=space.geometry,
        policy=policy.name,
        orders=tuple(sorted({order for job in jobs for order in job.rules.orders})),
        trigger=base.trigger,
        tunables=base.tunables,
        ranges=ranges[np.argsort(ranges.address)],
        folios=folios[np.argsort(folios.address)],
        refused=tuple(refused),
        planned_bytes=sum(end - start for job in jobs for start, end in job.segments),
    )


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
            groups.setdefault(_rules_for(vma, allowed.orders, base, follow_switches), []).append((vma, segment))
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


def _rules_for(vma: Vma, allowed: tuple[int, ...], base: Rules, follow_switches: bool) -> Rules:
    if vma.kind is not VmaKind.ANON:
        # The limits and the smaller orders are matters of anonymous memory.
        return Rules(base.geometry, (base.geometry.pmd_order,), "madvise", base.tunables)
    if follow_switches:
        return Rules(base.geometry, allowed, base.trigger, base.tunables, base.mthp_min_order)
    return base


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
