"""The collapse of an address space: plan it, and carry the plan out, kernel calls first and moves last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from mthp.abilities import threads
from mthp.addrspace import AddressSpace
from mthp.engine.allowed import allowed_of, made_by, mechanisms_of, split_price_of
from mthp.engine.carry import Carrier
from mthp.engine.lasting import remade_of_plan
from mthp.engine.planning import plan_space
from mthp.engine.report import CollapseReport, FolioTally
from mthp.engine.select import ORDERS_ENABLED, PlanOptions
from mthp.engine.space_plan import SpacePlan
from mthp.engine.visited import RestClock
from mthp.engine.work import Work
from mthp.errors import UsageError
from mthp.geometry import MIN_ANON_ORDER, Geometry
from mthp.means import USUAL_MEANS, Means, Mechanism, price_of_moving
from mthp.metrics import Durations
from mthp.progress import StepProgress
from mthp.ptes import Block

ORDER_OF_MECHANISMS: tuple[Mechanism, ...] = ("madvise", "split", "khugepaged", "move")

BeforeMove = Callable[[SpacePlan, Mechanism], None]


def collapse_space(
    space: AddressSpace,
    choice: PlanOptions,
    means: Means = USUAL_MEANS,
    *,
    dry_run: bool = False,
    progress: StepProgress | None = None,
    stop: Callable[[], bool] = lambda: False,
    before_move: BeforeMove = lambda plan, mechanism: None,
    clock: RestClock | None = None,
) -> CollapseReport:
    """Plan `space` and carry the plan out.

    With the mechanism ``move`` only orders below the PMD order are planned.

    Args:
        choice: what to collapse.
        means: how, and at what cost.
        stop: called before every range and every batch; once it returns True nothing more is begun, and the report
            holds the outcomes until then.
        before_move: called with the plan and the mechanism before the first page is moved, or khugepaged is driven.
        clock: the time that a rate and the report count in; by default that of this machine.

    Raises:
        UsageError: as :func:`mthp.plan_ranges`; the PMD order with the mechanism ``move``, which cannot make it; an
            option that the mechanism does not support.
        NotPermittedError: the rights do not suffice to collapse in the target.
        UnsupportedError: the backend or this kernel cannot collapse, or not by this mechanism.
        TargetVanishedError: the process exited before anything was done.
    """
    check_mechanism(means, small=choice.small)
    plan = plan_space(space, _to_be_planned(choice, means, space.geometry), stop=stop)
    return carry_out(
        space, plan, means, dry_run=dry_run, progress=progress, stop=stop, before_move=before_move, clock=clock
    )


def check_mechanism(means: Means, *, small: bool = False) -> None:
    """Check that the mechanism can do what `means` and `small` want.

    Args:
        small: memory outside of whole PMD ranges of its mapping is to be collapsed too.

    Raises:
        UsageError: the mechanism cannot.
    """
    if small and "move" not in means.mechanism:
        raise UsageError(
            f"the mechanism {means.mechanism} collapses whole PMD ranges only: --small needs the mover",
            help="use the mechanism move, or madvise,move; both inject code into the target",
        )
    if means.mechanism == "khugepaged" and (means.rate is not None or means.max_copied is not None or means.verify):
        raise UsageError(
            "the kernel's khugepaged keeps to no rate and no budget for copying, and verifies nothing",
            help="leave these out, or use another mechanism",
        )
    if means.mechanism == "khugepaged" and means.fill and means.max_bloat is not None:
        raise UsageError(
            "the kernel's khugepaged cannot keep to a bloat budget when it fills holes",
            help="leave fill out, or lift the budget: max-bloat none",
        )
    for name in ("fill", "verify"):
        if getattr(means, name) and means.mechanism in ("auto", "madvise", "split"):
            raise UsageError(
                f"{name} is for the mover: MADV_COLLAPSE always fills, and cannot verify",
                help="use the mechanism move, or madvise,move",
            )


def _to_be_planned(choice: PlanOptions, means: Means, geometry: Geometry) -> PlanOptions:
    """Return the options of the plan: for ``move`` without the PMD order.

    Raises:
        UsageError: the caller wants the PMD order by moving.
    """
    orders = choice.orders
    if means.mechanism != "move" or orders == ORDERS_ENABLED:
        return choice
    if orders is None:
        return dataclasses.replace(choice, orders=range(MIN_ANON_ORDER, geometry.pmd_order))
    parsed = geometry.parse_orders(orders)
    if geometry.pmd_order in parsed:
        raise UsageError(
            f"moving makes no folios of {geometry.label(geometry.pmd_order)}",
            help="leave that size out, or use madvise,move, which has the kernel's call make it",
        )
    return dataclasses.replace(choice, orders=parsed)


def carry_out(
    space: AddressSpace,
    plan: SpacePlan,
    means: Means,
    *,
    dry_run: bool = False,
    progress: StepProgress | None = None,
    stop: Callable[[], bool] = lambda: False,
    before_move: BeforeMove = lambda plan, mechanism: None,
    clock: RestClock | None = None,
) -> CollapseReport:
    """Carry out `plan`.

    Args:
        means, dry_run, progress, stop, before_move, clock: as for :func:`collapse_space`.

    Raises:
        NotPermittedError, UnsupportedError, TargetVanishedError: as :func:`collapse_space`. An error after
            something was done is in the report instead.
    """
    check_mechanism(means, small=plan.small)
    report = _not_begun(space, plan, means)
    if dry_run:
        report.dry_run, report.allowed = True, allowed_of(space, plan, means)
        return report
    by = {
        mechanism: plan.folios[np.isin(plan.folios.order, made_by(report.mechanisms, mechanism))]
        for mechanism in ORDER_OF_MECHANISMS
    }
    page_size = np.uint64(space.geometry.page_size)
    total = sum(int((page_size << folios.order.astype(np.uint64)).sum()) for folios in by.values())
    work = Work(space, means, report, total, progress, stop, clock)
    carriers = {mechanism: Carrier(work, mechanism) for mechanism in ORDER_OF_MECHANISMS}
    with work.reported():
        for mechanism, carrier in carriers.items():
            if not len(by[mechanism]) or report.ended_early:
                continue
            # Both change more than the planned memory: the mover injects code, khugepaged scans every process.
            if mechanism in ("khugepaged", "move"):
                before_move(plan, mechanism)
            carrier.carry_out(by[mechanism])
            report.verified |= mechanism == "move" and means.verify
        report.heat_share = _heat_share(plan, [block for carrier in carriers.values() for block in carrier.made])
        # Only folios below the PMD order are at risk: khugepaged makes no PMD folio smaller.
        if any(tally.made for tally in report.folios.values()):
            report.remade = remade_of_plan(space, plan)
    report.durations = Durations.of(carriers["madvise"].seconds + carriers["split"].seconds)
    report.windows = Durations.of(np.array(carriers["move"].pauses_ns) / 1e9)
    return report


def _not_begun(space: AddressSpace, plan: SpacePlan, means: Means) -> CollapseReport:
    """Return the report of a collapse that has not begun: the mechanism of each order, and the prices."""
    report = CollapseReport(plan, mechanisms=mechanisms_of(space, plan, means))
    for order, count in plan.folios_by_order.items():
        if (mechanism := report.mechanisms[order]) is None:
            report.needs_move[order] = count
        elif mechanism == "madvise":
            report.ranges = FolioTally(planned=count, not_tried=count)
        else:
            report.folios[order] = FolioTally(planned=count, not_tried=count)
    # The price is stated only if the user has a choice to make.
    if report.needs_move:
        report.move_price = price_of_moving(threads(space), means.max_pause_ns)
    report.split_price = split_price_of(space, plan, means)
    return report


def _heat_share(plan: SpacePlan, made: list[Block]) -> float | None:
    """Return the share of the accesses seen that go to the blocks made; None if no accesses were seen."""
    if plan.heat is None or not plan.heat.spans:
        return None
    start = np.array([address for address, _ in made], np.uint64)
    sizes = np.array([plan.geometry.size_of(order) for _, order in made], np.uint64)
    return plan.heat.share(start, start + sizes)
