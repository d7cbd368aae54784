"""``mthp doctor``: the abilities that this kernel and these rights allow, and how to get the rest."""

from __future__ import annotations

from dataclasses import dataclass

import click
from rich.console import Console

from mthp.cli.options import json_option
from mthp.cli.render.output import console, print_json, say
from mthp.cli.render.tables import Table
from mthp.linux.doctor.examination import examine
from mthp.linux.doctor.findings import Examination
from mthp.linux.journal.putback import Restored
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.mover.leftovers import Removed, remove_leftovers


@dataclass(frozen=True, slots=True)
class Restoration:
    """The result of `mthp doctor --restore`.

    Attributes:
        restored: switches that a killed run had changed.
        removed: leftovers in processes.
    """

    restored: list[Restored]
    removed: list[Removed]


@click.command("doctor")
@click.option(
    "--restore", is_flag=True, help="Put back the switches that mthp left when it was killed with its watcher."
)
@json_option
def command(restore: bool, as_json: bool) -> int:
    """Show which abilities this kernel and these rights allow, and how to get the rest.

    Everything is tried out, and nothing is changed. The exit code is 0 for all findings, but 3 if the kernel has no
    THP.

    With --restore it only puts back switches that a run left changed when it was killed with its watcher, and removes
    leftovers of an older version from processes. Switches that another program has changed since are left alone.
    """
    if restore:
        restored = SwitchJournal.restore_all()
        removed = remove_leftovers()
        if as_json:
            print_json("doctor", Restoration(restored, removed))
        else:
            print_restored(console(), restored, removed)
        # The reason why a leftover could not be removed.
        return 1 if any(each.reason for each in removed) else 0
    examination = examine()
    if as_json:
        print_json("doctor", examination)
    else:
        print_examination(console(), examination)
    return 0 if examination.has_thp else 3


def print_examination(out: Console, examination: Examination) -> None:
    """Print the findings as a table, each with its remedy below it."""
    geometry = examination.geometry
    out.print(
        f"Linux {examination.kernel}, {geometry.name}: base pages of {geometry.label(0)},"
        f" a PMD entry maps {geometry.label(geometry.pmd_order)} (order {geometry.pmd_order})",
        markup=False,
    )
    rows = []
    for finding in examination.findings:
        rows.append([finding.state, finding.key, f"{finding.title}: {finding.what}"])
        if finding.remedy:
            rows.append(["", "", f"remedy: {finding.remedy}"])
    out.print(Table("Abilities of this kernel and these rights", ["state", "key", "finding"], rows))


def print_restored(out: Console, restored: list[Restored], removed: list[Removed]) -> None:
    """Print the switches that were put back, and the leftovers that were removed from processes."""
    if not restored and not removed:
        say(out, "nothing to put back")
    for each in (*restored, *removed):
        say(out, str(each))
