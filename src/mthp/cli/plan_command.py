"""``mthp plan TARGET``: what a collapse would do: folios by order, bytes copied, bytes of bloat, ranges by outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import click
from rich.console import Console

from mthp.abilities import move_refusals
from mthp.cli.options import at_option, json_option, plan_options, planned, target_argument
from mthp.cli.output import console, note, percent, print_json, progress_bar, say
from mthp.cli.render.tables import Table
from mthp.engine.allowed import Allowed, allowed_of
from mthp.engine.lasting import Remade, remade_of_plan
from mthp.engine.planning import plan_space
from mthp.engine.space_plan import SpacePlan
from mthp.geometry import Geometry
from mthp.means import USUAL_MEANS, Means
from mthp.targets import open_target
from mthp.units import format_size

TOP_REASONS = 8
"""Reasons for leaving memory alone that are shown, the ones that concern most memory."""


@dataclass(frozen=True, slots=True)
class Now:
    """What `mthp collapse` would do of a plan.

    Attributes:
        geometry: of the machine.
        by_default: what it would do.
        missing: what could not be seen, and what would make it visible.
        move_hindrances: why the mover would not begin.
        remade: what khugepaged would make huge again of the folios below the PMD size.
    """

    JSON: ClassVar = "by_default missing move_hindrances remade"

    geometry: Geometry
    by_default: Allowed
    missing: tuple[str, ...]
    move_hindrances: list[str]
    remade: Remade


@click.command("plan")
@target_argument
@plan_options
@at_option
@json_option
def command(target: str, as_json: bool, at: str | None, **options: Any) -> None:
    """Say what a collapse of TARGET could do, what of it `mthp collapse` would do by default, and change nothing.

    TARGET is a PID, the word self, or a snapshot or recording. Limits are the system's own unless given.
    """
    with open_target(target, at=at) as space, progress_bar("planning", hidden=as_json) as progress:
        plan = plan_space(space, planned(options), progress)
        allowed = allowed_of(space, plan, USUAL_MEANS)
        missing = space.missing
        smaller = any(order < plan.geometry.pmd_order for order in plan.folios_by_order)
        hindrances = move_refusals(space, Means(mechanism="move")) if smaller else []
        again = remade_of_plan(space, plan)
    if as_json:
        print_json("plan", plan, Now(plan.geometry, allowed, missing, hindrances, again))
        return
    out = console()
    print_plan(out, plan)
    print_allowed(out, plan, allowed)
    refused = [f"the mover (--mechanism move) would not begin: {reason}" for reason in hindrances]
    note(out, [*filter(None, [again.remark]), *refused, *missing])


def size_and_more(plan: SpacePlan) -> str:
    """Name the sizes that the coverage of a plan is stated for."""
    geometry = plan.geometry
    more = "" if plan.asked_order == geometry.pmd_order else " and more"
    return f"{geometry.label(plan.asked_order)}{more}"


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
    rows = [
        [geometry.label(order), str(count), format_size(count * geometry.size_of(order))]
        for order, count in plan.folios_by_order.items()
    ]
    out.print(Table("Folios to be made", ["size", "folios", "bytes"], rows or [["none", "0", "0"]], right={1, 2}))
    outcomes = [[result.name, str(count), result.meaning] for result, count in plan.ranges_by_result.items()]
    title = f"PMD ranges of {geometry.label(geometry.pmd_order)} by outcome"
    out.print(Table(title, ["result", "ranges", "meaning"], outcomes, right={1}))
    out.print(left_table(plan))


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
    bound = "no bound" if allowed.bloat_budget is None else f"at most {format_size(allowed.bloat_budget)}"
    out.print()
    say(
        out,
        f"mthp collapse would make {made} of these {len(plan.folios)} folios"
        f" and add {format_size(allowed.filled_bytes)} of bloat (--max-bloat: {bound})",
    )
    rows = [[geometry.label(left.order), str(left.count), left.reason] for left in allowed.left]
    if rows:
        out.print(Table("It would leave", ["size", "folios", "reason"], rows, right={1}))
