"""``mthp snapshot PID -o FILE``: record the page layout of a process."""

from __future__ import annotations

from pathlib import Path

import click

from mthp.cli.options import json_option, target_argument
from mthp.cli.output import console, print_json, progress_bar, say
from mthp.targets import open_target
from mthp.units import format_size


@click.command("snapshot")
@target_argument
@click.option("-o", "--output", required=True, metavar="FILE", type=click.Path(path_type=Path), help="File to write.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@json_option
def command(target: str, output: Path, force: bool, as_json: bool) -> None:
    """Record which pages of TARGET are mapped, and how, in a Parquet file.

    The file holds addresses, page states, the names of mappings and the system's switches. It holds no contents of
    memory, no environment and no arguments. `mthp inspect` and `mthp plan` take it in place of a PID.
    """
    from mthp.snapshot import record

    with open_target(target) as space, progress_bar("recording", hidden=as_json) as progress:
        info = record(space, output, progress=progress, overwrite=force)
    if as_json:
        print_json("snapshot", info)
        return
    say(
        console(),
        f"{info.path}: {info.label}, {info.vmas} mappings, {info.pages} pages in {info.runs} runs,"
        f" {format_size(info.bytes)}",
    )
