"""The report on one address space: its memory, the effect of each policy on it, and the price.

The report makes many plans of the same memory, and a running process changes between them. So a process is recorded
first, as `mthp snapshot` does, and everything in the report is of that one moment.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from mthp.addrspace import AddressSpace
from mthp.engine.census import STATES, Census, VmaCensus, take_census
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.engine.space_plan import SpacePlan
from mthp.geometry import Geometry
from mthp.lab.compare import DEFAULT_POLICIES, compare, settings_of
from mthp.metrics import out_of_reach_remark
from mthp.progress import StepProgress
from mthp.report import compared, timeline
from mthp.report.document import Cell, Command, Document, Figure, ReportTable, Section, figures
from mthp.report.memorymap import MemoryMap, make_map
from mthp.report.timeline import Timeline
from mthp.units import format_size, percent

MAPPINGS = 60
"""Mappings in the table: those with most memory."""


@dataclass(frozen=True, slots=True)
class Source:
    """The source of a report's memory.

    Attributes:
        space: address space of the report; it is read more than once, so it must not change meanwhile.
        recorded_at: time of the recording, in words.
        later: the same process afterwards, or None to show the predicted effect of the plan.
        arguments: the process's command line if it is to be shown, else ``""``.
        timeline: the recording up to `space`, or None if there is none.
    """

    space: AddressSpace
    recorded_at: str
    later: AddressSpace | None = None
    arguments: str = ""
    timeline: Timeline | None = None


def report_on(
    source: Source,
    options: PlanOptions,
    commands: Sequence[Command],
    progress: StepProgress = lambda *_: None,
) -> Document:
    """Return the report on an address space.

    Args:
        options: options of the plan that is shown in full; the comparison varies policies and limits.
        commands: commands that repeat the report.

    Raises:
        UsageError: as :func:`mthp.engine.planning.plan_space`.
        TargetVanishedError: the process exited meanwhile.
    """
    space = source.space
    census = take_census(space, lambda done, total: progress(done, total, "counting pages"))
    facts = _facts(source, census)
    if not census.total.resident and not census.total.state("swap"):
        return Document(census.label, _NOTHING_RESIDENT, facts, commands=commands, notes=census.missing)
    plan = plan_space(space, options, lambda done, total: progress(done, total, "planning"))
    after = None if source.later is None else take_census(source.later)
    comparison = compare(
        space,
        settings_of(DEFAULT_POLICIES, max_ptes_none=_limits(census.geometry), include_file=options.include_file),
        scans=None,
        # Page walks take a second for each of the settings.
        walks=False,
        progress=lambda done, total: progress(done, total, "comparing"),
    )
    return Document(
        title=census.label,
        verdict=_verdict(census, plan, after),
        facts=facts,
        figures=_figures(census, plan, after),
        sections=(
            _map_section(source, census, plan, progress),
            *(() if source.timeline is None else (timeline.section(source.timeline),)),
            compared.section(compared.Compared.of(comparison)),
            _plan_section(plan),
            _mappings_section(census),
        ),
        commands=commands,
        notes=census.missing,
    )


_NOTHING_RESIDENT = (
    "Nothing is resident: the process has no memory of its own, neither in RAM nor in swap, so there is nothing to"
    " collapse."
)


def _limits(geometry: Geometry) -> list[int]:
    # From the kernel's default (khugepaged_max_ptes_none in khugepaged_init(), mm/khugepaged.c) down to no holes at
    # all.
    n = geometry.ptes_per_pmd
    return [n - 1, n // 2, n // 8, 0]


def _pmd(geometry: Geometry) -> str:
    return geometry.label(geometry.pmd_order)


def _covered(census: Census) -> float:
    return census.anonymous.coverage.share(census.geometry.pmd_order)


def _verdict(census: Census, plan: SpacePlan, after: Census | None) -> str:
    pmd = _pmd(census.geometry)
    if after is not None:
        grown = (after.total.resident - census.total.resident) * census.geometry.page_size
        return (
            f"{percent(_covered(census))} of the anonymous memory was mapped by {pmd} pages before,"
            f" {percent(_covered(after))} is afterwards; resident memory"
            f" {'grew' if grown >= 0 else 'shrank'} by {format_size(abs(grown))}."
        )
    if not len(plan.folios):
        return f"There is nothing to collapse with the policy {plan.policy} and these limits."
    resident = plan.before.resident * plan.geometry.page_size
    return (
        f"With the policy {plan.policy}, a collapse would take the memory that {pmd} pages map from"
        f" {percent(plan.before.share(plan.geometry.pmd_order))} to"
        f" {percent(plan.after.share(plan.geometry.pmd_order))} of {format_size(resident)}, copy"
        f" {format_size(plan.copied_bytes)}, and add {format_size(plan.filled_bytes)}."
    )


def _figures(census: Census, plan: SpacePlan, after: Census | None) -> tuple[Figure, ...]:
    geometry = census.geometry
    pmd = _pmd(geometry)
    resident = census.total.resident * geometry.page_size
    anon = census.anonymous.resident * geometry.page_size
    figures = [Figure(format_size(resident), "resident", f"{format_size(anon)} of it anonymous")]
    if after is not None:
        grown = (after.total.resident - census.total.resident) * geometry.page_size
        share = f"{percent(grown / resident)} of the resident memory before" if resident else "from nothing resident"
        return (
            *figures,
            Figure(percent(_covered(census)), f"{pmd} pages before", "of the anonymous memory"),
            Figure(percent(_covered(after)), f"{pmd} pages afterwards", "of the anonymous memory"),
            Figure(format_size(grown), "grown", share),
        )
    share = percent(plan.filled_bytes / resident if resident else 0.0)
    return (
        *figures,
        Figure(percent(plan.before.share(geometry.pmd_order)), f"{pmd} pages now", "of the anonymous memory"),
        Figure(percent(plan.after.share(geometry.pmd_order)), f"{pmd} pages with the plan", f"policy {plan.policy}"),
        Figure(format_size(plan.filled_bytes), "would be added", f"{share} of the resident memory"),
    )


def _facts(source: Source, census: Census) -> tuple[tuple[str, str], ...]:
    geometry, tunables = census.geometry, source.space.tunables
    sizes = ", ".join(f"{geometry.label(order)} {word}" for order, word in sorted(census.switches.sizes.items()))
    facts = [
        ("process", census.label),
        ("as it was", source.recorded_at),
        (
            "kernel",
            f"Linux {census.kernel}, {geometry.name}, pages of {geometry.label(0)}, PMD ranges of {_pmd(geometry)}",
        ),
        ("transparent_hugepage/enabled", census.switches.enabled),
        ("enabled by size", sizes or "no switches by size"),
        *((f"khugepaged/{knob.name}", str(int(getattr(tunables, knob.name)))) for knob in dataclasses.fields(tunables)),
    ]
    if census.thp_disabled:
        facts.append(("PR_SET_THP_DISABLE", "set: the process switched THP off for itself"))
    if source.arguments:
        facts.append(("arguments", source.arguments))
    return tuple(facts)


def _map_section(source: Source, census: Census, plan: SpacePlan, progress: StepProgress) -> Section:
    later = "afterwards" if source.later is not None else "with the plan"
    memory: MemoryMap = make_map(
        source.space,
        census,
        names=("now" if source.later is None else "before", later),
        folios=plan.folios,
        later=source.later,
        progress=lambda done, total: progress(done, total, "drawing"),
    )
    lead = (
        "Each column is filled from below with what its stretch of addresses holds, the largest folios first."
        " Hatched parts are empty, and a collapse would fill them."
    )
    return Section("The address space", lead, maps=(memory,))


def _plan_section(plan: SpacePlan) -> Section:
    geometry = plan.geometry
    sizes = [
        (
            Cell(geometry.label(order)),
            *figures(f"{count:,}", format_size(count * geometry.size_of(order))),
        )
        for order, count in plan.folios_by_order.items()
    ]
    results = [
        (Cell(result.name), Cell(f"{count:,}", figure=True), Cell(result.meaning))
        for result, count in plan.ranges_by_result.items()
    ]
    left = [
        (*figures(format_size(left.resident), format_size(left.size), f"{left.mappings or ''}"), Cell(left.reason))
        for left in plan.left
    ]
    limits = plan.tunables
    lead = (
        f"Policy {plan.policy}, sizes {', '.join(geometry.label(order) for order in plan.orders) or 'none'};"
        f" max_ptes_none {limits.max_ptes_none}, max_ptes_swap {limits.max_ptes_swap},"
        f" max_ptes_shared {limits.max_ptes_shared}."
    )
    reach = out_of_reach_remark(plan.out_of_reach_bytes, geometry)
    return Section(
        "The plan",
        f"{lead} {reach[:1].upper()}{reach[1:]}{'.' if reach else ''}".rstrip(),
        tables=(
            ReportTable("Folios to be made", ("size", "folios", "bytes"), sizes),
            ReportTable(f"PMD ranges of {_pmd(geometry)} by outcome", ("result", "ranges", "meaning"), results),
            ReportTable("Left alone", ("resident", "bytes", "mappings", "reason"), left, folded=True),
        ),
    )


def _mappings_section(census: Census) -> Section:
    geometry, total = census.geometry, census.total
    sizes = [
        (
            Cell(geometry.label(order)),
            *figures(format_size(pages * geometry.page_size), percent(pages / max(total.resident, 1))),
            *figures(format_size(int(census.anonymous.orders[order]) * geometry.page_size)),
        )
        for order, pages in total.by_order().items()
    ]
    if total.unknown:
        anonymous = format_size(census.anonymous.unknown * geometry.page_size)
        size = format_size(total.unknown * geometry.page_size)
        share = percent(total.unknown / total.resident)
        sizes.append((Cell("not visible"), *figures(size, share, anonymous)))
    states = [
        (Cell(name.replace("_", " ")), Cell(format_size(total.state(name) * geometry.page_size), figure=True))
        for name in STATES
        if total.state(name)
    ]
    largest = sorted(census.vmas, key=lambda vma: -vma.pages.resident)[:MAPPINGS]
    rows = [_mapping(vma, geometry) for vma in largest if vma.pages.resident or vma.pages.state("swap")]
    columns = ("address", "size", "resident", _pmd(geometry), "may become", "name")
    return Section(
        "Composition",
        tables=(
            ReportTable("Resident memory by folio size", ("folio size", "bytes", "share", "anonymous"), sizes),
            ReportTable("States of pages", ("state", "bytes"), states, folded=True),
            ReportTable(f"Mappings: the largest {len(rows)} of {len(census.vmas)}", columns, rows, folded=True),
        ),
    )


def _mapping(vma: VmaCensus, geometry: Geometry) -> tuple[Cell, ...]:
    allowed = vma.madvise
    return (
        Cell(f"{vma.vma.start:x}-{vma.vma.end:x} {vma.vma.permissions}"),
        *figures(format_size(vma.vma.size), format_size(vma.pages.resident * geometry.page_size)),
        *figures(percent(vma.pages.coverage.share(geometry.pmd_order))),
        Cell(
            f"{geometry.label(allowed.orders[0])} to {geometry.label(allowed.orders[-1])}"
            if allowed
            else allowed.reason
        ),
        Cell(vma.vma.name or "anonymous"),
    )
