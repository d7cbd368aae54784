"""``mthp plan TARGET``: a predicted collapse: folios by order, bytes copied, bytes of bloat, ranges by outcome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import click
from rich.console import Console

from mthp.abilities import move_refusals
from mthp.addrspace import AddressSpace
from mthp.cli.options import at_option, json_option, made_of, plan_options, small_option
from mthp.cli.render.output import console, note, print_json, progress_bar
from mthp.cli.render.planned import print_allowed, print_plan, reach_table, reached_share
from mthp.cli.render.tables import Table
from mthp.cli.several import (
    Each,
    Failed,
    Total,
    common_geometry,
    common_share,
    do_each,
    print_each,
    summed,
    targets_argument,
)
from mthp.engine.allowed import Allowed, allowed_of, split_price_of
from mthp.engine.lasting import Remade, remade_of_plan
from mthp.engine.planning import plan_space
from mthp.engine.reached import Reach, reach_of
from mthp.engine.select import PlanOptions
from mthp.engine.space_plan import SpacePlan
from mthp.engine.splitprice import SplitPrice
from mthp.geometry import Geometry
from mthp.means import SMALL_MEANS, USUAL_MEANS, Means
from mthp.metrics import out_of_reach_remark
from mthp.targets import Found, find_targets
from mthp.units import format_size, percent


@dataclass(frozen=True, slots=True)
class Now:
    """The part of a plan that `mthp collapse` would carry out, and its price.

    Attributes:
        geometry: geometry of the machine.
        by_default: the part within the default bounds.
        missing: facts that could not be read, and what would make them readable.
        move_refusals: reasons for which the mover would not begin.
        split_price: cost of splits.
        rss_after_bytes: resident bytes of the whole target after splits made all of the plan, at most; None if nothing
            is made by splits.
        remade: folios below the PMD size that khugepaged would make huge again.
        reach: the part that memory allows; None if that was not requested.
    """

    JSON: ClassVar = "by_default missing move_refusals split_price rss_after_bytes remade reach"

    geometry: Geometry
    by_default: Allowed
    missing: tuple[str, ...]
    move_refusals: list[str]
    split_price: SplitPrice
    rss_after_bytes: int | None
    remade: Remade
    reach: Reach | None = None


@dataclass(frozen=True, slots=True)
class Planned:
    """A plan, and the part of it that `mthp collapse` would carry out.

    Attributes:
        plan, now: as the object of a single target.
    """

    JSON: ClassVar = "*plan *now"

    plan: SpacePlan
    now: Now

    @property
    def geometry(self) -> Geometry:
        """The machine's geometry."""
        return self.plan.geometry


class PlanSum(Total):
    """The sums of several plans."""

    JSON: ClassVar = (
        "planned_bytes resident_bytes copied_bytes bloat_bytes=filled_bytes coverage coverage_after already_bytes"
        " out_of_reach_bytes"
    )

    planned_bytes = summed("planned_bytes")
    resident_bytes = summed("resident_bytes")
    copied_bytes = summed("copied_bytes")
    filled_bytes = summed("filled_bytes")
    already_bytes = summed("already_bytes")
    out_of_reach_bytes = summed("out_of_reach_bytes")

    @property
    def coverage(self) -> float:
        """The share of all targets' memory in folios of the requested sizes."""
        return common_share(self.parts, [plan.before for plan in self.parts])

    @property
    def coverage_after(self) -> float:
        """The same share after the plans are carried out."""
        return common_share(self.parts, [plan.after for plan in self.parts])


@dataclass(frozen=True, slots=True)
class Plans:
    """The plans of several targets.

    Attributes:
        targets: the plan of each, or its error.
        total: their sums.
    """

    targets: tuple[Planned | Failed, ...]
    total: PlanSum


@click.command("plan")
@targets_argument
@plan_options
@small_option
@click.option(
    "--reachable",
    is_flag=True,
    help="Predict the coverage that this machine's memory allows, too: now, after compaction, and after a trim, which"
    " searches TARGET's large folios for zeroes.",
)
@at_option
@json_option
def command(targets: tuple[str, ...], as_json: bool, at: str | None, reachable: bool, **options: Any) -> int:
    """Predict a collapse of each TARGET, and the part that `mthp collapse` would do by default. Changes nothing.

    A TARGET is a PID, the word self, a snapshot or recording, or a name as `mthp --help` lists them. Limits are the
    system's own unless given.
    """
    wanted = made_of(PlanOptions, options)

    def work(found: Found) -> tuple[Planned, int]:
        with found.open(at=at) as space, progress_bar(f"planning {found.label}", hidden=as_json) as progress:
            plan = plan_space(space, wanted, progress)
            smaller = any(order < plan.geometry.pmd_order for order in plan.folios_by_order)
            # Only folios below the PMD size need the mover.
            refusals = move_refusals(space, Means(mechanism="move")) if smaller else []
            means = SMALL_MEANS if plan.small else USUAL_MEANS
            allowed, again = allowed_of(space, plan, means), remade_of_plan(space, plan)
            price = split_price_of(space, plan, means)
            # This plans and evaluates all of the target again.
            resident = _resident_after(space, wanted) if price.ranges else None
            reach = reach_of(space, plan, means, progress) if reachable else None
            now = Now(plan.geometry, allowed, space.missing, refusals, price, resident, again, reach)
            return Planned(plan, now), 0

    each = do_each(find_targets(targets), work)
    # Sums of pages of different sizes would mean nothing.
    geometry, total = common_geometry(each.done), PlanSum([made.plan for made in each.done])
    if as_json:
        print_json("plan", each.done[0] if each.single else Plans(each.all, total))
    elif each.one:
        _print_one(console(), each.done[0])
    else:
        reach = out_of_reach_remark(total.out_of_reach_bytes, geometry)
        print_each(each, targets_table(each, total), [reach])
    return each.code


def _resident_after(space: AddressSpace, wanted: PlanOptions) -> int:
    # Imported here, because the lab takes time to load and most plans do not need it.
    from mthp.lab.evaluate import resident_by_splitting

    return resident_by_splitting(space, wanted)


def _print_one(out: Console, made: Planned) -> None:
    print_plan(out, made.plan)
    print_allowed(out, made.plan, made.now.by_default)
    if made.now.reach is not None:
        out.print(reach_table(made.plan, made.now.reach))
    refused = [f"the mover (--mechanism move) would not begin: {reason}" for reason in made.now.move_refusals]
    heat = made.plan.heat.remark if made.plan.heat is not None else ""
    price = made.now.split_price.remark(made.plan.geometry)
    if made.now.rss_after_bytes is not None:
        price += f"; then {format_size(made.now.rss_after_bytes)} of the process are resident, at most"
    reach = out_of_reach_remark(made.plan.out_of_reach_bytes, made.plan.geometry, recommend=not made.plan.small)
    remarks = [price, made.now.remade.remark, heat, reach]
    note(out, [*remarks, *refused, *made.now.missing])


def targets_table(each: Each[Planned], total: PlanSum) -> Table:
    """Return a table with a line for each target, and their sum."""
    columns = ["target", "resident", "copied", "bloat", "before", "after", "service", "reason"]
    ways: list[str] = []
    if any(made.now.reach is not None for made in each.done):
        # Each as if it were alone.
        ways = ["now", "compacted", "trimmed"]
        columns += ["now", "after compaction", "after a trim"]

    def line(found: Found, made: Planned) -> list[str]:
        reached = [getattr(made.now.reach, way) for way in ways]
        return [made.plan.label, *_cells(made.plan), found.service, "", *map(reached_share, reached)]

    rows = each.lines(line, len(columns))
    rows.append(["in all", *_cells(total), "", "", *("" for _ in ways)])
    title = f"{each.counted}: the effect of a collapse; before and after are shares of anonymous memory"
    return Table(title, columns, rows, right={1, 2, 3, 4, 5, 8, 9, 10}, names={0, 6})


def _cells(plan: SpacePlan | PlanSum) -> list[str]:
    sizes = [format_size(size) for size in (plan.resident_bytes, plan.copied_bytes, plan.filled_bytes)]
    return [*sizes, percent(plan.coverage), percent(plan.coverage_after)]
