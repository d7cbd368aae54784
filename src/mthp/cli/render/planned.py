"""A plan, as tables: what becomes of its memory, what is left alone, and what the kernel may do about it."""

from __future__ import annotations

from rich.console import Console

from mthp.cli.render.output import say
from mthp.cli.render.tables import Table
from mthp.engine.allowed import Allowed
from mthp.engine.reached import Reach, Reached
from mthp.engine.space_plan import SpacePlan
from mthp.heat import Heat
from mthp.means import SMALL_MEANS
from mthp.units import format_size, percent

TOP_REASONS = 8
"""Reasons for leaving memory alone that are shown, the ones that concern most memory."""


def reach_table(plan: SpacePlan, reach: Reach) -> Table:
    """Return what of a plan memory allows in each way, and what limits it."""
    ways = {"now": reach.now, "after compaction": reach.compacted, "after a trim": reach.trimmed}
    rows = [
        [
            way,
            reached_share(reached),
            "" if reached.size is None else format_size(reached.size),
            " ".join(f"{count} of {plan.geometry.label(order)}" for order, count in reached.folios_by_order.items()),
            reached.limit,
        ]
        for way, reached in ways.items()
    ]
    title = f"In reach: the share mapped as {size_and_more(plan)} that this machine's memory allows"
    return Table(title, ["when", "in reach", "bytes", "folios", "limited by"], rows, right={1, 2})


def reached_share(reached: Reached) -> str:
    """Return the coverage in reach as a cell."""
    return "unknown" if reached.coverage is None else percent(reached.coverage)


def size_and_more(plan: SpacePlan) -> str:
    """Name the sizes that the coverage of a plan is stated for."""
    geometry = plan.geometry
    more = "" if plan.coverage_order == geometry.pmd_order else " and more"
    return f"{geometry.label(plan.coverage_order)}{more}"


def scope_name(plan: SpacePlan) -> str:
    """Name the memory that the coverage of a plan is a share of."""
    kind = "memory" if plan.scope.files else "anonymous memory"
    return f"of the {kind}" + ("" if plan.scope.within is None else " in the chosen range")


def print_plan(out: Console, plan: SpacePlan) -> None:
    """Print a plan: a heading with the sums, then folios, outcomes, and what is left alone."""
    geometry = plan.geometry
    limits = plan.tunables
    sizes = ",".join(geometry.label(order) for order in plan.orders) or "none"
    say(
        out,
        f"{plan.label}: policy {plan.policy}, sizes {sizes}, max_ptes_none {limits.max_ptes_none},"
        f" swap {limits.max_ptes_swap}, shared {limits.max_ptes_shared}",
    )
    say(
        out,
        f"would copy {format_size(plan.copied_bytes)}, add {format_size(plan.filled_bytes)} of bloat,"
        f" and take the share {scope_name(plan)} ({format_size(plan.before.resident * geometry.page_size)}) that is"
        f" mapped as {size_and_more(plan)} from {percent(plan.coverage)} to {percent(plan.coverage_after)}",
    )
    if plan.heat is not None:
        say(out, heat_line(plan.heat, plan.heat_share))
    rows = [
        [geometry.label(order), str(count), format_size(count * geometry.size_of(order))]
        for order, count in plan.folios_by_order.items()
    ]
    out.print(Table("Folios to be made", ["size", "folios", "bytes"], rows or [["none", "0", "0"]], right={1, 2}))
    outcomes = [[result.name, str(count), result.meaning] for result, count in plan.ranges_by_result.items()]
    title = f"PMD ranges of {geometry.label(geometry.pmd_order)} by outcome"
    out.print(Table(title, ["result", "ranges", "meaning"], outcomes, right={1}))
    if plan.left:
        out.print(left_table(plan))


def heat_line(heat: Heat, share: float | None) -> str:
    """Say what saw the accesses, at what cost, and which share of them folios would serve."""
    cost = f" in {heat.seconds:.1f} s, for {percent(heat.cpu_share)} of one processor" if heat.seconds else ""
    if share is None:
        return f"heat by {heat.source}{cost}: no access was observed"
    return f"heat by {heat.source}{cost}: these folios would serve {percent(share)} of the observed accesses"


def left_table(plan: SpacePlan) -> Table:
    """Return what the plan does not reach, by reason."""
    rows = [
        [format_size(left.resident), format_size(left.size), str(left.mappings or ""), left.reason]
        for left in plan.left[:TOP_REASONS]
    ]
    return Table("Left alone", ["resident", "bytes", "mappings", "reason"], rows, right={0, 1, 2})


def print_allowed(out: Console, plan: SpacePlan, allowed: Allowed) -> None:
    """Print what of a plan `mthp collapse` would do within its bounds, and why it would leave the rest."""
    geometry = plan.geometry
    made = sum(allowed.folios_by_order.values())
    how = f" --small --mechanism {SMALL_MEANS.mechanism}" if plan.small else ""
    bound = "no bound" if allowed.bloat_budget is None else f"at most {format_size(allowed.bloat_budget)}"
    out.print()
    say(
        out,
        f"mthp collapse{how} would make {made} of these {len(plan.folios)} folios"
        f" and add {format_size(allowed.filled_bytes)} of bloat (--max-bloat: {bound})",
    )
    rows = [[geometry.label(left.order), str(left.count), left.reason] for left in allowed.left]
    if rows:
        out.print(Table("It would leave", ["size", "folios", "reason"], rows, right={1}))
