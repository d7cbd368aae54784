"""``mthp inspect TARGET``: pages by folio order, per mapping and in all; huge coverage; eligible or why not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import click
from rich.console import Console

from mthp.cli.options import at_option, json_option
from mthp.cli.render.output import console, note, print_json, progress_bar, say
from mthp.cli.render.tables import Table
from mthp.cli.several import Each, Failed, common_geometry, do_each, print_each, targets_argument
from mthp.engine.census import STATES, Census, PageCounts, VmaCensus, take_census
from mthp.geometry import Geometry
from mthp.metrics import ALIGNED, PARTIAL, PMD, UNALIGNED, out_of_reach_remark
from mthp.targets import Found, find_targets
from mthp.units import format_size, percent

TOP_MAPPINGS = 20
"""Mappings shown without --all: those with most resident memory."""


@dataclass(frozen=True, slots=True)
class Censuses:
    """The pages of several targets.

    Attributes:
        geometry: geometry of their machine.
        targets: the census of each, or its error.
        total, anonymous: the pages of all targets; a page that several of them map counts for each.
    """

    JSON: ClassVar = "geometry targets total anonymous"

    geometry: Geometry
    targets: tuple[Census | Failed, ...]
    total: PageCounts
    anonymous: PageCounts


@click.command("inspect")
@targets_argument
@click.option("--all", "show_all", is_flag=True, help="Show every mapping, not just the largest.")
@click.option("--numa", is_flag=True, help="Show also on which NUMA nodes the pages of each mapping lie.")
@click.option("--zero-filled", is_flag=True, help="Read the contents, and count the pages of nothing but zeroes.")
@at_option
@json_option
def command(
    targets: tuple[str, ...], show_all: bool, numa: bool, zero_filled: bool, as_json: bool, at: str | None
) -> int:
    """Count the pages of each TARGET by folio order, per mapping and in all.

    A TARGET is a PID, the word self, a snapshot or recording, or a name as `mthp --help` lists them. Aligned folios are
    mapped whole at a multiple of their size; unaligned and partial ones spare no TLB entries. A mapping may become the
    sizes that the kernel's khugepaged may make of it; with "on request", those that only mthp or MADV_COLLAPSE may.

    Pages of zeroes in large folios are the cost of huge pages: the kernel frees those of a PMD-sized folio when memory
    gets scarce, if shrink_underused is on and the folio has more of them than max_ptes_none.
    """

    def work(found: Found) -> tuple[Census, int]:
        with found.open(at=at) as space, progress_bar(f"reading {found.label}", hidden=as_json) as progress:
            return take_census(space, progress, nodes=numa, zero_filled=zero_filled), 0

    each = do_each(find_targets(targets), work)
    censuses = Censuses(
        common_geometry(each.done),
        each.all,
        PageCounts.total([census.total for census in each.done]),
        PageCounts.total([census.anonymous for census in each.done]),
    )
    if as_json:
        print_json("inspect", each.done[0] if each.single else censuses)
    elif each.one:
        print_census(console(), each.done[0], show_all=show_all)
    else:
        geometry = censuses.geometry
        reach = out_of_reach_remark(censuses.anonymous.out_of_reach_bytes(geometry), geometry)
        print_each(each, targets_table(each, censuses), [reach])
    return each.code


def targets_table(each: Each[Census], censuses: Censuses) -> Table:
    """Return a table with a line for each target, and their sum."""
    geometry = censuses.geometry
    pmd = geometry.label(geometry.pmd_order)
    columns = ["target", "resident", "anonymous", f"{pmd} mapped", "large", "service", "reason"]
    rows = each.lines(
        lambda found, census: [
            census.label,
            *_coverage_cells(census.total, census.anonymous, geometry),
            found.service,
            "",
        ],
        len(columns),
    )
    rows.append(["in all", *_coverage_cells(censuses.total, censuses.anonymous, geometry), "", ""])
    title = f"{each.counted}; memory that several of them share counts for each"
    # The reason of an error; most often there is none.
    if not any(row[-1] for row in rows):
        rows, columns = [row[:-1] for row in rows], columns[:-1]
    return Table(title, columns, rows, right={1, 2, 3, 4}, names={0, 5})


def _coverage_cells(every: PageCounts, anonymous: PageCounts, geometry: Geometry) -> list[str]:
    return [
        _size(every.resident, geometry),
        _size(anonymous.resident, geometry),
        percent(anonymous.huge_coverage(geometry)),
        percent(anonymous.large_coverage),
    ]


def print_census(out: Console, census: Census, *, show_all: bool = False) -> None:
    """Print a census as two tables: sizes, then mappings."""
    geometry = census.geometry
    say(out, f"{census.label}, Linux {census.kernel}, {geometry.name}")
    out.print(sizes_table(census))
    ranked = sorted(census.vmas, key=lambda vma: -vma.pages.resident)
    shown = [vma for vma in ranked if vma.pages.resident or vma.pages.state("swap")]
    if not show_all:
        shown = shown[:TOP_MAPPINGS]
    rows = [_mapping_row(vma, geometry) for vma in (census.vmas if show_all else shown)]
    title = f"Mappings ({len(rows)} of {len(census.vmas)})"
    columns = ["address", "perm", "size", "resident", "huge", "folios", "may become", "nodes", "name"]
    if not any(vma.vma.node_pages for vma in shown):
        # NUMA nodes were not requested, or cannot be read.
        rows, columns = [[*row[:-2], row[-1]] for row in rows], [*columns[:-2], columns[-1]]
    out.print(Table(title, columns, rows, right={2, 3, 4}, names={len(columns) - 1}))
    reach = out_of_reach_remark(census.anonymous.out_of_reach_bytes(geometry), geometry)
    note(out, [reach, *census.missing])


def sizes_table(census: Census) -> Table:
    """Return the table of resident memory by folio size."""
    geometry, every, anon = census.geometry, census.total, census.anonymous
    zeroes = anon.zero_filled
    rows = [
        [
            geometry.label(order),
            _size(pages, geometry),
            percent(pages / every.resident),
            _size(int(anon.orders[order]), geometry),
            *_alignments(every, order, geometry),
            *([] if zeroes is None else [_size(int(zeroes[order]), geometry)]),
        ]
        for order, pages in every.by_order().items()
    ]
    if every.unknown:
        row = [_size(every.unknown, geometry), percent(every.unknown / every.resident), _size(anon.unknown, geometry)]
        # The last element counts folios of unknown order.
        rows.append(["not visible", *row, "", "", "", *([] if zeroes is None else [_size(int(zeroes[-1]), geometry)])])
    row = [_size(every.resident, geometry), "", _size(anon.resident, geometry)]
    rows.append(["in all", *row, "", "", "", *([] if zeroes is None else [_size(int(zeroes.sum()), geometry)])])
    rows += [
        [name.replace("_", " "), _size(every.state(name), geometry), "", _size(anon.state(name), geometry), "", "", ""]
        + ([] if zeroes is None else [""])
        for name in STATES
        if every.state(name)
    ]
    pmd = geometry.label(geometry.pmd_order)
    title = (
        f"Resident memory by folio size; of the anonymous memory {percent(anon.coverage.share(geometry.pmd_order))}"
        f" is mapped as {pmd}, {percent(anon.coverage.share(1))} as any size above {geometry.label(0)}"
    )
    columns = ["folio size", "bytes", "share", "anonymous", "aligned", "unaligned", "partial"]
    columns += [*([] if zeroes is None else ["zero-filled"])]
    return Table(title, columns, rows, right=range(1, len(columns)))


def _alignments(pages: PageCounts, order: int, geometry: Geometry) -> list[str]:
    """Return sizes by how the folios of an order are mapped: wholly and aligned, wholly and unaligned, in part."""
    if not order:
        return ["", "", ""]
    aligned = pages.mapped_as(PMD, order) + pages.mapped_as(ALIGNED, order)
    others = (pages.mapped_as(kind, order) for kind in (UNALIGNED, PARTIAL))
    return [_size(count, geometry) for count in (aligned, *others)]


def _mapping_row(vma: VmaCensus, geometry: Geometry) -> list[str]:
    pages = vma.pages
    folios = " ".join(f"{geometry.label(order)}:{_size(count, geometry)}" for order, count in pages.by_order().items())
    return [
        f"{vma.vma.start:x}-{vma.vma.end:x}",
        vma.vma.permissions,
        format_size(vma.vma.size),
        _size(pages.resident, geometry),
        percent(pages.coverage.share(geometry.pmd_order)),
        folios or "-",
        _may_become(vma, geometry),
        " ".join(f"{node}:{_size(count, geometry)}" for node, count in vma.vma.node_pages),
        vma.vma.name,
    ]


def _may_become(vma: VmaCensus, geometry: Geometry) -> str:
    """Return the sizes that khugepaged may make of a mapping, else those on request, else the reason for none."""
    if vma.khugepaged:
        return _labels(vma.khugepaged.orders, geometry)
    if vma.madvise:
        return f"{_labels(vma.madvise.orders, geometry)} on request"
    return vma.madvise.reason


def _labels(orders: Sequence[int], geometry: Geometry) -> str:
    """Return a list of sizes, abbreviated to its ends if they are consecutive."""
    if len(orders) > 2 and orders[-1] - orders[0] == len(orders) - 1:
        return f"{geometry.label(orders[0])} to {geometry.label(orders[-1])}"
    return ",".join(geometry.label(order) for order in orders)


def _size(pages: int, geometry: Geometry) -> str:
    return format_size(pages * geometry.page_size)
