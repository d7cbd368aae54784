"""``mthp snapshot PID -o FILE``: record the page layout of a process."""

from __future__ import annotations

from pathlib import Path

import click

from mthp.abilities import heat_of
from mthp.cli.options import heat_option, json_option, target_argument
from mthp.cli.render.output import console, print_json, progress_bar, say
from mthp.heat import HeatRequest
from mthp.targets import open_target
from mthp.units import format_size


@click.command("snapshot")
@target_argument
@click.option("-o", "--output", required=True, metavar="FILE", type=click.Path(path_type=Path), help="File to write.")
@heat_option
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@json_option
def command(target: str, output: Path, force: bool, heat: HeatRequest | None, as_json: bool) -> None:
    """Record which pages of TARGET are mapped, and how, in a file.

    The file holds addresses, page states, the names of mappings and the system's switches. It holds no contents of
    memory, no environment and no arguments. `mthp inspect` and `mthp plan` take it in place of a PID. With --heat it
    also holds which memory is used, which plans and comparisons of the file then weigh.

    The file is Parquet, which needs pyarrow; if its name ends with .mthp, it is in mthp's own format, which needs no
    package.
    """
    from mthp.snapshot import record

    with open_target(target) as space, progress_bar("recording", hidden=as_json) as progress:
        seen = heat_of(space, heat)
        info = record(space, output, progress=progress, overwrite=force, heat=seen)
    if as_json:
        print_json("snapshot", info)
        return
    say(
        console(),
        f"{info.path}: {info.label}, {info.vmas} mappings, {info.pages} pages in {info.runs} runs,"
        f" {format_size(info.bytes)}",
    )
