"""The choice of the mappings that may be collapsed, and of their rules: once, for plans, collapses and visits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mthp.abilities import AnyHeat
from mthp.addrspace import AddressSpace
from mthp.eligibility import Trigger, eligibility
from mthp.engine.bits import Bits
from mthp.engine.filled import FilledPages
from mthp.engine.plan import make_rules
from mthp.engine.planes import Planes, planes_of
from mthp.engine.policy import Policy, Rules
from mthp.engine.policy_lookup import policy_named
from mthp.geometry import MIN_ANON_ORDER, Geometry
from mthp.movechecks import refuse_vma
from mthp.ptes import ORDER_NONE, PteColumns, Segment, in_portions, page_numbers, spread
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma, VmaKind

PORTION_PMD_RANGES = 128
"""PMD ranges to read and plan at a time: 65 536 PTEs on x86-64."""

ORDERS_ENABLED = "enabled"
"""Value of `orders` that means the orders that the machine's switches allow each mapping."""


@dataclass(frozen=True, slots=True)
class PlanOptions:
    """What to choose: which folios to make of which memory.

    Attributes:
        policy: a policy, or its name.
        orders: the enabled orders; None for all that anonymous memory can have, ``"enabled"`` for those that the
            machine's switches allow.
        trigger: ``khugepaged``, which respects the limits, or ``madvise``.
        max_ptes_none, max_ptes_swap, max_ptes_shared: limits per PMD range; by default those of the target's machine.
        mthp_min_order: the seed's MTHP_MIN_ORDER, for the policy ``rfc``; 3 by default.
        include_file: choose memory of files and shared memory too, at the PMD order.
        small: also choose memory outside of whole PMD ranges of its mapping, which only the mover collapses.
        within: choose from this range of addresses only.
        filled: pages that earlier collapses filled, for policies that remember them. A visit keeps its own.
        switches, tunables: used in place of the present ones of the machine.
        heat: which memory is used, or an object that measures it, so that the most used comes first; by default the
            heat recorded with the target.
    """

    policy: str | Policy = "mainline"
    orders: Iterable[int] | str | None = None
    trigger: Trigger = "khugepaged"
    max_ptes_none: int | None = None
    max_ptes_swap: int | None = None
    max_ptes_shared: int | None = None
    mthp_min_order: int | None = None
    include_file: bool = False
    small: bool = False
    within: Segment | None = None
    filled: FilledPages | None = None
    switches: Switches | None = None
    tunables: Tunables | None = None
    heat: AnyHeat = None


@dataclass(frozen=True, slots=True)
class Job:
    """Mappings under the same rules: their PMD ranges, and the facts of each mapping.

    Attributes:
        rules: rules of these mappings.
        small: whether `segments` are parts of PMD ranges, of which several may lie in one.
        segments: the whole PMD ranges of each mapping, by ascending address; or one part of a PMD range each.
        listed: int64, shape (mappings,), index of each in the list of mappings.
        starts: uint64, shape (mappings,), start address of each.
        uffd_armed, droppable: bool, shape (mappings,), as in :class:`~mthp.vma.Vma`.
    """

    rules: Rules
    small: bool
    segments: list[Segment]
    listed: NDArray[np.int64]
    starts: NDArray[np.uint64]
    uffd_armed: NDArray[np.bool_]
    droppable: NDArray[np.bool_]


def base_rules(space: AddressSpace, options: PlanOptions) -> Rules:
    """Return the rules for anonymous memory, from `options`, and from `space` for what they leave open.

    Raises:
        UsageError: as :func:`mthp.plan_ranges`.
    """
    geometry = space.geometry
    tunables = (options.tunables or space.tunables).replaced(
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
    """Group the mappings that may be collapsed by their rules; return the others with the reason.

    Args:
        base: result of :func:`base_rules`.
        vmas: the mappings, if they are already listed.
    """
    follow_switches = options.orders == ORDERS_ENABLED
    groups: dict[tuple[Rules, bool], list[tuple[int, Vma, Segment]]] = {}
    refused = []
    # Read once, not for each mapping, because a live target reads files for it.
    geometry, switches, thp_disabled = space.geometry, options.switches or space.switches, space.thp_disabled
    for at, vma in enumerate(space.vmas() if vmas is None else vmas):
        allowed = eligibility(
            vma,
            geometry,
            switches,
            trigger="khugepaged" if follow_switches else "madvise",
            thp_disabled=thp_disabled,
            include_file=options.include_file,
            small=options.small,
        )
        if not allowed:
            # A mapping outside of `within` was not requested, so it is not a refusal.
            if options.within is None or (vma.start < options.within[1] and options.within[0] < vma.end):
                refused.append((vma, allowed.reason))
            continue
        rules = _rules_for(vma, allowed.orders, base, switches, follow_switches=follow_switches)
        segment = _clipped(vma.pmd_ranges(geometry), options.within, geometry)
        if segment is not None:
            # Parts differ from whole ranges in how they are read, so they never share a job.
            groups.setdefault((rules, False), []).append((at, vma, segment))
        for part in _parts(vma, options, geometry) if options.small else ():
            groups.setdefault((rules, True), []).append((at, vma, part))
    jobs = [
        Job(
            rules,
            small,
            [segment for _, _, segment in members],
            np.array([at for at, _, _ in members], np.int64),
            np.array([vma.start for _, vma, _ in members], np.uint64),
            np.array([vma.uffd_armed for _, vma, _ in members]),
            np.array([vma.droppable for _, vma, _ in members]),
        )
        for (rules, small), members in groups.items()
    ]
    return jobs, refused


def _rules_for(vma: Vma, allowed: tuple[int, ...], base: Rules, switches: Switches, *, follow_switches: bool) -> Rules:
    if vma.kind is not VmaKind.ANON:
        # Limits and smaller orders apply to anonymous memory only.
        return Rules(base.geometry, (base.geometry.pmd_order,), "madvise", base.tunables, of_file=True)
    return _switched(base, allowed, switches) if follow_switches else base


def _switched(base: Rules, allowed: tuple[int, ...], switches: Switches) -> Rules:
    """Return the rules of a mapping for which the machine's switches allow the orders `allowed`."""
    always = tuple(order for order in allowed if switches.sizes.get(order) == "always")
    return replace(base, orders=allowed, always=always)


def _clipped(segment: Segment, within: Segment | None, geometry: Geometry) -> Segment | None:
    """Return the whole PMD ranges of `segment` that lie in `within`; None if there are none."""
    start, end = segment
    if within is not None:
        size = geometry.pmd_size
        start, end = max(start, -(-within[0] // size) * size), min(end, within[1] // size * size)
    return (start, end) if start < end else None


def _parts(vma: Vma, options: PlanOptions, geometry: Geometry) -> list[Segment]:
    """Return the parts of PMD ranges of a mapping that only the mover collapses.

    If a policy gives up an order for the rest of a PMD range, each of the largest aligned blocks is returned as a
    separate part, because an order that does not fit at one place has not failed.
    """
    # A plan must not promise what the mover will refuse.
    if vma.kind is not VmaKind.ANON or refuse_vma(vma):
        return []
    parts = vma.parts(geometry, options.within)
    if not policy_named(options.policy).scans_each_run:
        return parts
    return [block for part in parts for block in _aligned_blocks(part, geometry)]


def _aligned_blocks(part: Segment, geometry: Geometry) -> Iterator[Segment]:
    """Yield the largest naturally aligned blocks of a part of a PMD range, except those below `MIN_ANON_ORDER`."""
    at, end = (address // geometry.page_size for address in part)
    while at < end:
        order = min(at & -at, 1 << ((end - at).bit_length() - 1)).bit_length() - 1
        if order >= MIN_ANON_ORDER:
            yield at * geometry.page_size, (at + (1 << order)) * geometry.page_size
        at += 1 << order


def portions_of(
    job: Job, segments: Sequence[Segment], geometry: Geometry, most: int = PORTION_PMD_RANGES
) -> Iterator[list[Segment]]:
    """Group segments of a job, and cut whole PMD ranges, so that a group has at most `most` ranges."""
    if not job.small:
        yield from in_portions(segments, most * geometry.pmd_size)
        return
    for first in range(0, len(segments), most):
        yield list(segments[first : first + most])


def read_parts(space: AddressSpace, job: Job, parts: Sequence[Segment]) -> tuple[PteColumns, Planes]:
    """Return the entries of some parts of PMD ranges, and planes with a row for each, empty outside of the part."""
    geometry = space.geometry
    columns = space.read(parts)
    firsts, ends = page_numbers(parts, geometry.page_size).T
    offsets = np.arange(len(parts)) * geometry.ptes_per_pmd + firsts % geometry.ptes_per_pmd
    pages = spread(offsets, ends - firsts)
    count = len(parts) * geometry.ptes_per_pmd
    state, order = np.zeros(count, np.uint16), np.full(count, ORDER_NONE, np.int8)
    outside: Bits = np.ones(count, np.bool_)
    state[pages], order[pages], outside[pages] = columns.state, columns.folio_order, False
    vma = np.searchsorted(job.starts, np.array([start for start, _ in parts], np.uint64), side="right") - 1
    planes = planes_of(
        PteColumns((), state, order), geometry, uffd_armed=job.uffd_armed[vma], droppable=job.droppable[vma]
    )
    return columns, replace(planes, outside=outside.reshape(planes.present.shape))


def read_planes(space: AddressSpace, job: Job, addresses: NDArray[np.uint64]) -> tuple[PteColumns, Planes]:
    """Read some PMD ranges of a job, adjoining ranges of a mapping as one segment; return the entries and planes.

    Args:
        addresses: uint64, shape (ranges,), ascending, start address of each.
    """
    size = space.geometry.pmd_size
    vma = np.searchsorted(job.starts, addresses, side="right") - 1
    # One read per run of adjoining ranges, because a live target costs a system call for each segment.
    breaks = np.flatnonzero((np.diff(addresses) != size) | (np.diff(vma) != 0)) + 1
    starts, ends = addresses[np.r_[0, breaks]], addresses[np.r_[breaks - 1, len(addresses) - 1]]
    columns = space.read([(start, end + size) for start, end in zip(starts.tolist(), ends.tolist(), strict=True)])
    armed, droppable = job.uffd_armed[vma], job.droppable[vma]
    return columns, planes_of(columns, space.geometry, uffd_armed=armed, droppable=droppable)


def ranges_of(segments: Sequence[Segment], geometry: Geometry) -> NDArray[np.uint64]:
    """Return the start address of each PMD range of `segments`: uint64, shape (ranges,)."""
    return np.concatenate([np.arange(start, end, geometry.pmd_size, dtype=np.uint64) for start, end in segments])
