"""The mappings of an address space at one moment, as areas for a visit to go over."""

from __future__ import annotations

from dataclasses import dataclass

from mthp.addrspace import AddressSpace
from mthp.engine.policy import Policy
from mthp.engine.select import Job, PlanOptions, base_rules, jobs_of
from mthp.vma import VmaKind


@dataclass(frozen=True, slots=True)
class Area:
    """Whole PMD ranges of one mapping that may be collapsed, and may have contents."""

    start: int
    end: int
    job: Job
    passed: int
    """Mappings and empty stretches between the previous area and this one."""


@dataclass(frozen=True, slots=True)
class Listing:
    """The mappings at one moment."""

    at: float
    thp_disabled: bool
    areas: list[Area]
    passed_behind: int
    refused: dict[tuple[VmaKind, str], tuple[int, int]]
    has_room: bool


def list_areas(space: AddressSpace, choice: PlanOptions, policy: Policy, now: float) -> Listing:
    """List the mappings of `space`, and the areas of them in which `policy` walks any order."""
    geometry, thp_disabled, vmas = space.geometry, space.thp_disabled, space.vmas()
    jobs, left_alone = jobs_of(space, choice, base_rules(space, choice), vmas)
    refused: dict[tuple[VmaKind, str], tuple[int, int]] = {}
    for vma, reason in left_alone:
        mappings, size = refused.get((vma.kind, reason), (0, 0))
        refused[vma.kind, reason] = mappings + 1, size + vma.size
    members = [
        (int(listed), segment, job)
        for job in jobs
        if policy.orders_walked(job.rules)
        for listed, segment in zip(job.listed, job.segments, strict=True)
    ]
    areas: list[Area] = []
    # Mappings listed, and stretches skipped, up to the last area.
    passed = behind = 0
    for listed, (first, last), job in sorted(members, key=lambda member: member[0]):
        passed += listed - behind
        behind, at = listed + 1, first
        for start, end in space.populated([(first, last)], geometry.pmd_size):
            passed += start > at
            areas.append(Area(start, end, job, passed))
            passed, at = 0, end
        passed += at < last
    has_room = any(vma.kind is VmaKind.ANON and vma.size >= geometry.pmd_size for vma in vmas)
    return Listing(now, thp_disabled, areas, passed + len(vmas) - behind, refused, has_room)
