"""Carries out the plan of an address space: first what the kernel's call does, then what takes moving."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from mthp.addrspace import AddressSpace
from mthp.collapsing.blocks import Blocks
from mthp.collapsing.kernel import by_khugepaged
from mthp.collapsing.options import CollapseOptions
from mthp.collapsing.ranges import Ranges
from mthp.collapsing.report import CollapseReport, Durations, FolioTally
from mthp.collapsing.work import Progress, Work
from mthp.errors import UsageError
from mthp.geometry import MIN_ANON_ORDER, Geometry
from mthp.planning import ORDERS_ENABLED, PlanOptions, plan_space
from mthp.space_plan import SpacePlan


def collapse_space(
    space: AddressSpace,
    options: CollapseOptions,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
    before_move: Callable[[SpacePlan], None] = lambda plan: None,
) -> CollapseReport:
    """Plan `space` and carry the plan out.

    With the mechanism ``move`` only orders below the PMD order are planned.

    Args:
        stop: asked before every range and every batch; once it says True nothing more is begun, and the report says
            what was done.
        before_move: told of the plan before the first page is moved.

    Raises:
        UsageError: as :func:`mthp.plan_ranges`; the PMD order, and the mechanism ``move``, which cannot make it.
        NotPermittedError: these rights do not suffice to collapse in the target.
        UnsupportedError: the backend or this kernel cannot collapse, or not by this mechanism.
        TargetVanishedError: the process exited before anything was done.
    """
    plan = plan_space(space, _to_be_planned(options, space.geometry))
    return carry_out(space, plan, options, progress, stop, before_move)


def _to_be_planned(options: CollapseOptions, geometry: Geometry) -> PlanOptions:
    """What is to be planned for `options`.

    Raises:
        UsageError: the PMD order, by moving.
    """
    orders = options.plan.orders
    if options.mechanism != "move" or orders == ORDERS_ENABLED:
        return options.plan
    if orders is None:
        return dataclasses.replace(options.plan, orders=range(MIN_ANON_ORDER, geometry.pmd_order))
    parsed = geometry.parse_orders(orders)
    if geometry.pmd_order in parsed:
        raise UsageError(
            f"moving makes no folios of {geometry.label(geometry.pmd_order)}",
            help="leave that size out, or use the mechanism auto, which has the kernel's call make it",
        )
    return dataclasses.replace(options.plan, orders=parsed)


def carry_out(
    space: AddressSpace,
    plan: SpacePlan,
    options: CollapseOptions,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
    before_move: Callable[[SpacePlan], None] = lambda plan: None,
) -> CollapseReport:
    """Carry out `plan`.

    Args:
        plan: of `space`; `options.plan` is not looked at.
        progress, stop, before_move: as for :func:`collapse_space`.

    Raises:
        NotPermittedError, UnsupportedError, TargetVanishedError: as :func:`collapse_space`. An error that comes when
            something was done already is in the report.
    """
    if options.mechanism == "khugepaged":
        return by_khugepaged(space, plan, options, progress, stop, before_move)
    report = CollapseReport(plan, dry_run=options.dry_run)
    pmd_order = space.geometry.pmd_order
    targets = plan.folios[plan.folios.order == pmd_order]
    smaller = plan.folios[plan.folios.order < (0 if options.mechanism == "madvise" else pmd_order)]
    if options.mechanism == "madvise":
        report.needs_move = {order: count for order, count in plan.folios_by_order.items() if order != pmd_order}
    counts = [(order, count) for order, count in plan.folios_by_order.items() if (smaller.order == order).any()]
    report.folios = {order: FolioTally(planned=count, not_tried=count) for order, count in counts}
    report.not_tried = len(targets)
    if options.dry_run:
        return report
    total = len(targets) * space.geometry.pmd_size + _bytes_of(smaller.order, space.geometry)
    work = Work(space, options, report, total, progress, stop)
    # Stable, so that ranges equally full are collapsed by ascending address.
    ranges = Ranges(work, targets.address[np.argsort(targets.filled, kind="stable")])
    blocks = Blocks(work, smaller)
    with work.reported():
        ranges.carry_out()
        if len(smaller) and not report.ended_early:
            before_move(plan)
            blocks.carry_out()
            report.verified = options.verify
    report.durations = Durations.of(ranges.seconds)
    report.windows = Durations.of(np.array(blocks.pauses_ns) / 1e9)
    return report


def _bytes_of(orders: np.typing.NDArray[np.int8], geometry: Geometry) -> int:
    return int((np.int64(geometry.page_size) << orders.astype(np.int64)).sum())
