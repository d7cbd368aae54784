"""``mthp compare TARGET``: policies side by side: coverage, bloat, creep, and in words the best ones."""

from __future__ import annotations

import re
from typing import Any

import click

from mthp.abilities import heat_of
from mthp.cli.completing import complete_policies
from mthp.cli.options import at_option, heat_option, json_option, target_argument
from mthp.cli.render.output import console, note, print_json, progress_bar, say
from mthp.cli.render.tables import Table
from mthp.errors import UsageError
from mthp.metrics import out_of_reach_remark
from mthp.targets import open_target
from mthp.units import format_size, percent


@click.command("compare")
@target_argument
@click.option(
    "--policies",
    metavar="NAMES",
    shell_complete=complete_policies,
    help="Policies, separated by commas; by default all but rfc2. NAME:split is mthp by splitting.",
)
@click.option(
    "--max-ptes-none", metavar="N,...", help="Empty pages a collapse may fill, per PMD range; several values."
)
@click.option("--max-ptes-swap", metavar="N,...", help="Swapped pages it may read back.")
@click.option("--max-ptes-shared", metavar="N,...", help="Shared pages it may copy.")
@click.option("--orders", metavar="SIZES", help="Folio sizes, such as 16K,64K,2M; all by default; or 'enabled'.")
@click.option("--scans", default="1", show_default=True, metavar="N", help="Scans, or 'all': until nothing changes.")
@click.option("--covered", metavar="SIZE", help="Folio size from which on memory counts as covered; the PMD size.")
@click.option(
    "--processor", default="skylake", show_default=True, metavar="NAME", help="Processor that the TLB figures are for."
)
@click.option("--zero-filled", is_flag=True, help="Read the contents, to predict what splits and a trim give back.")
@click.option("--include-file", is_flag=True, help="Memory of files and shared memory too, at the PMD size.")
@heat_option
@at_option
@json_option
def command(target: str, as_json: bool, at: str | None, scans: str, **options: Any) -> None:
    """Compare the effect of several policies on TARGET, and name the best ones.

    A policy is on the frontier if no other reaches more coverage for the same bloat, or the same for less. With --scans
    every policy's plan is carried out in memory and scanned again, which shows creep. Nothing of the target changes.

    Page walks are counted for the trace that a recording was made from, or for random accesses to the memory that
    --heat, or the heat in the recording, shows to be used. Hot coverage is the part of the accesses that go to memory
    that PMD entries map.
    """
    from mthp.lab.compare import DEFAULT_POLICIES, compare, settings_of
    from mthp.lab.tlb import Processor

    policies = _words(options["policies"]) if options["policies"] is not None else list(DEFAULT_POLICIES)
    settings = settings_of(
        policies,
        max_ptes_none=_numbers("--max-ptes-none", options["max_ptes_none"]),
        max_ptes_swap=_numbers("--max-ptes-swap", options["max_ptes_swap"]),
        max_ptes_shared=_numbers("--max-ptes-shared", options["max_ptes_shared"]),
        orders=(options["orders"],),
        include_file=options["include_file"],
    )
    with open_target(target, at=at) as space, progress_bar("comparing", hidden=as_json) as progress:
        covered = options["covered"]
        result = compare(
            space,
            settings,
            scans=_scans(scans),
            covered=None if covered is None else space.geometry.parse_order(covered),
            processor=Processor.named(options["processor"]),
            heat=heat_of(space, options["heat"]),
            contents=options["zero_filled"],
            progress=progress,
        )
    if as_json:
        print_json("compare", result)
        return
    _print(result)
    reach = out_of_reach_remark(result.out_of_reach_bytes, result.geometry)
    note(console(), [reach, *result.missing])


def _print(result: Any) -> None:
    out = console()
    size = result.geometry.label(result.covered)
    frontier = dict(zip(result.names, result.frontier, strict=True))
    rows = result.rows
    # All settings have the same number of scans.
    last = rows[-1]["scan"]
    say(
        out, f"{result.label}: {len(frontier)} settings, {format_size(rows[0]['resident_bytes'])} that may be collapsed"
    )
    columns = [
        "setting",
        f"{size} coverage",
        "large folios",
        "bloat",
        "given back",
        "copied",
        "folios",
        "TLB entries",
        "CPU",
        "frontier",
    ]
    before, shown = rows[0], [row for row in rows if row["scan"] == last]
    # The state before is the same for all settings.
    cells = [_cells(before | {"setting": "now"}, "")]
    cells += [_cells(row, "yes" if frontier[row["setting"]] else "") for row in shown]
    title = "After one scan" if last == 1 else f"After {last} scans"
    if before["hot_coverage"] is not None:
        columns.append("hot coverage")
        cells = [[*row, percent(shown["hot_coverage"])] for row, shown in zip(cells, [before, *shown], strict=True)]
    if "tlb_misses" in before:
        columns.append("page walks")
        cells = [[*row, f"{shown['tlb_misses']:,}"] for row, shown in zip(cells, [before, *shown], strict=True)]
    out.print(Table(title, columns, cells, right={*range(1, 9), 10, 11}))
    if last > 1:
        lines = [
            [name, *(format_size(row["creep_bytes"]) for row in rows if row["setting"] == name and row["scan"] > 0)]
            for name in frontier
        ]
        heads = ["setting", *(f"scan {scan}" for scan in range(1, last + 1))]
        out.print(Table("Memory added by each scan", heads, lines, right=set(range(1, last + 1))))
    say(out, "")
    for sentence in result.verdict:
        say(out, sentence)


def _cells(row: dict[str, Any], on_frontier: str) -> list[str]:
    return [
        row["setting"],
        percent(row["coverage"]),
        percent(row["large_coverage"]),
        f"{format_size(row['bloat_bytes'])} ({percent(row['bloat_share'])})",
        format_size(row["given_back_bytes"]),
        format_size(row["copied_bytes"]),
        str(row["folios"]),
        f"{row['translations']:.0f}",
        f"{row['khugepaged_seconds']:.2f} s",
        on_frontier,
    ]


def _words(text: str) -> list[str]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    # A policy that is named twice would have two rows of one name.
    return list(dict.fromkeys(words))


def _numbers(option: str, text: str | None) -> list[int | None]:
    """Return the numbers of ``64,511``.

    Raises:
        UsageError: not a list of numbers.
    """
    if text is None:
        return [None]
    try:
        return [int(word) for word in _words(text)] or [None]
    except ValueError:
        raise UsageError(f"{option} {text!r} is not a list of numbers", help=f"write {option} 0,64,511") from None


def _scans(text: str) -> int | None:
    if text == "all":
        return None
    # int() would also take blanks, underscores and digits of other scripts.
    if not re.fullmatch("[0-9]{1,4}", text) or not 1 <= int(text) <= 1000:
        raise UsageError(f"--scans {text!r} is neither a number from 1 to 1000 nor 'all'", help="use --scans all")
    return int(text)
