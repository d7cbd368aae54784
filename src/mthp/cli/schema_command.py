"""``mthp schema COMMAND``: the JSON Schema of a command's output with ``--json``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pkgutil import resolve_name

import click

from mthp.errors import MthpError
from mthp.objects import Schema, schema_of

OBJECTS = {
    "doctor": [["mthp.linux.doctor.findings:Examination"], ["mthp.cli.doctor_command:Restoration"]],
    "inspect": [["mthp.engine.census:Census"], ["mthp.cli.inspect_command:Censuses"]],
    "plan": [["mthp.cli.plan_command:Planned"], ["mthp.cli.plan_command:Plans"]],
    "collapse": [["mthp.cli.collapse_command:Collapsed"], ["mthp.cli.collapse_command:Collapses"]],
    "trim": [["mthp.engine.trim:TrimReport"], ["mthp.cli.trim_command:Trims"]],
    "explain": [["mthp.engine.explain:Explanation", "mthp.cli.explain_command:History"]],
    "verify": [["mthp.engine.verify:Verification"], ["mthp.cli.verify_command:Verifications"]],
    "status": [["mthp.daemon.service:Daemon"]],
    "pause": [["mthp.daemon.worker:Worker"]],
    "resume": [["mthp.daemon.worker:Worker"]],
    "snapshot": [["mthp.snapshot.description:SnapshotInfo"]],
    "record": [
        ["mthp.snapshot.recorder:Recorded"],
        ["mthp.cli.record_command:Recordings"],
        ["mthp.snapshot.fromtrace:RecordedTrace"],
    ],
    "compare": [["mthp.lab.compare:Comparison"]],
    "sweep": [["mthp.lab.sweep:SweepReport"]],
    "simulate": [["mthp.lab.simulated:Simulation"]],
    "report": [["mthp.cli.report_command:Written"]],
    "conformance": [["mthp.sim.golden.conformance:ReplayTotals"]],
    "demo": [["mthp.demo.story:Story"]],
}
"""Classes of each command's output: alternative objects, each with the keys of one or two classes. By name, so that
only those of one command are imported.
"""


@dataclass(frozen=True, slots=True)
class Failure:
    """Output of a command that failed."""

    error: MthpError


@click.command("schema")
@click.argument("name", metavar="COMMAND", type=click.Choice(list(OBJECTS)))
def command(name: str) -> None:
    """Print the JSON Schema of the output of COMMAND with --json.

    An object that has only `schema` and `error` is the output of a command that failed. docs/figures.md defines every
    key.
    """
    click.echo(json.dumps(schema(name), indent=2))


def schema(name: str) -> Schema:
    """Return the JSON Schema of a command's output."""
    alternatives = [tuple(map(resolve_name, classes)) for classes in OBJECTS[name]]
    return schema_of(f"mthp.{name}/1", *alternatives, (Failure,))
