"""What each policy would make of one address space, under several limits: the table behind the frontier."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mthp.addrspace import AddressSpace
from mthp.planning import PlanOptions, SpacePlan, plan_space

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A plan in figures.

    Attributes:
        policy, max_ptes_none: what it was made with.
        huge_coverage: share of resident memory that PMD entries map afterwards.
        bloat_bytes: bytes that resident memory grows by.
        bloat_share: the same as a share of what is resident in the planned mappings.
        copied_bytes: bytes that are copied.
        folios_by_order: folios made.
        resident_bytes: before, in the planned mappings.
        on_frontier: no other outcome covers as much for less bloat, or more for as little.
    """

    policy: str
    max_ptes_none: int
    huge_coverage: float
    bloat_bytes: int
    bloat_share: float
    copied_bytes: int
    folios_by_order: dict[int, int]
    resident_bytes: int
    on_frontier: bool = False


def outcome_of(plan: SpacePlan) -> Outcome:
    """The figures of `plan`."""
    resident = int(plan.ranges.resident.sum()) * plan.geometry.page_size
    return Outcome(
        plan.policy,
        plan.tunables.max_ptes_none,
        plan.coverage_after,
        plan.filled_bytes,
        plan.filled_bytes / resident if resident else 0.0,
        plan.copied_bytes,
        plan.folios_by_order,
        resident,
    )


def outcomes(
    space: AddressSpace,
    options: PlanOptions,
    policies: Sequence[str],
    limits: Sequence[int],
    progress: Progress | None = None,
) -> list[Outcome]:
    """Plan `space` under every one of `policies` with every one of `limits` for max_ptes_none.

    Raises:
        UsageError, TargetVanishedError: as :func:`mthp.planning.plan_space`.
    """
    found = []
    for number, (policy, limit) in enumerate((policy, limit) for policy in policies for limit in limits):
        plan = plan_space(space, dataclasses.replace(options, policy=policy, max_ptes_none=limit))
        found.append(outcome_of(plan))
        if progress is not None:
            progress(number + 1, len(policies) * len(limits))
    return marked(found)


def marked(found: Sequence[Outcome]) -> list[Outcome]:
    """`found` with those marked that lie on the frontier of coverage against bloat."""

    def beaten(one: Outcome) -> bool:
        return any(
            other.huge_coverage >= one.huge_coverage
            and other.bloat_bytes <= one.bloat_bytes
            and (other.huge_coverage, other.bloat_bytes) != (one.huge_coverage, one.bloat_bytes)
            for other in found
        )

    return [dataclasses.replace(one, on_frontier=not beaten(one)) for one in found]
