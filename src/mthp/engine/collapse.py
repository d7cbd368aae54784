"""Carries out the plan of an address space: first what the kernel's call does, then what takes moving."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from mthp.addrspace import AddressSpace, Mechanism
from mthp.engine.allowed import allowed_of, mechanisms_of
from mthp.engine.blocks import Blocks
from mthp.engine.kernel import in_windows
from mthp.engine.options import CollapseOptions
from mthp.engine.planning import plan_space
from mthp.engine.ranges import Ranges
from mthp.engine.report import CollapseReport, FolioTally
from mthp.engine.select import ORDERS_ENABLED, PlanOptions
from mthp.engine.space_plan import Folios, SpacePlan
from mthp.engine.work import Progress, Work
from mthp.errors import UsageError
from mthp.geometry import MIN_ANON_ORDER, Geometry
from mthp.metrics import Durations
from mthp.price import price_of_moving

BeforeMove = Callable[[SpacePlan, Mechanism], None]


def collapse_space(
    space: AddressSpace,
    options: CollapseOptions,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
    before_move: BeforeMove = lambda plan, mechanism: None,
) -> CollapseReport:
    """Plan `space` and carry the plan out.

    With the mechanism ``move`` only orders below the PMD order are planned.

    Args:
        stop: asked before every range and every batch; once it says True nothing more is begun, and the report says
            what was done.
        before_move: called with the plan and the mechanism before the first page is moved, or khugepaged is driven.

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
            help="leave that size out, or use madvise,move, which has the kernel's call make it",
        )
    return dataclasses.replace(options.plan, orders=parsed)


def carry_out(
    space: AddressSpace,
    plan: SpacePlan,
    options: CollapseOptions,
    progress: Progress | None = None,
    stop: Callable[[], bool] = lambda: False,
    before_move: BeforeMove = lambda plan, mechanism: None,
) -> CollapseReport:
    """Carry out `plan`.

    Args:
        plan: of `space`; `options.plan` is not looked at.
        progress, stop, before_move: as for :func:`collapse_space`.

    Raises:
        NotPermittedError, UnsupportedError, TargetVanishedError: as :func:`collapse_space`. An error that comes when
            something was done already is in the report.
    """
    geometry = space.geometry
    report = CollapseReport(plan, dry_run=options.dry_run)
    report.mechanisms = mechanisms_of(space, plan, options)
    targets, moved, driven = (_made_by(plan.folios, report.mechanisms, by) for by in ("madvise", "move", "khugepaged"))
    report.needs_move = {order: n for order, n in plan.folios_by_order.items() if report.mechanisms[order] is None}
    if report.needs_move:
        report.move_price = price_of_moving(space.threads(), options.means.max_pause_ns)
    counts = {
        order: n for order, n in plan.folios_by_order.items() if report.mechanisms[order] not in ("madvise", None)
    }
    report.folios = {order: FolioTally(planned=count, not_tried=count) for order, count in counts.items()}
    report.not_tried = len(targets)
    if options.dry_run:
        report.allowed = allowed_of(space, plan, options)
        return report
    total = sum(_bytes_of(folios.order, geometry) for folios in (targets, moved, driven))
    work = Work(space, options, report, total, progress, stop)
    # Stable, so that ranges equally full are collapsed by ascending address.
    ranges = Ranges(work, targets.address[np.argsort(targets.filled, kind="stable")])
    blocks = Blocks(work, moved)
    with work.reported():
        ranges.carry_out()
        if len(driven) and not report.ended_early:
            before_move(plan, "khugepaged")
            in_windows(work, driven)
        if len(moved) and not report.ended_early:
            before_move(plan, "move")
            blocks.carry_out()
            report.verified = options.verify
    report.durations = Durations.of(ranges.seconds)
    report.windows = Durations.of(np.array(blocks.pauses_ns) / 1e9)
    return report


def _made_by(folios: Folios, mechanisms: dict[int, Mechanism | None], by: str) -> Folios:
    return folios[np.isin(folios.order, [order for order, mechanism in mechanisms.items() if mechanism == by])]


def _bytes_of(orders: np.typing.NDArray[np.int8], geometry: Geometry) -> int:
    return int((np.int64(geometry.page_size) << orders.astype(np.int64)).sum())
