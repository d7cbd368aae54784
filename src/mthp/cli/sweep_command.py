"""``mthp sweep DIR --grid GRID.toml``: many snapshots and recordings by many settings, into one Parquet file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from mthp.cli.options import json_option
from mthp.cli.render.output import console, print_json, progress_bar, say
from mthp.cli.render.tables import Table
from mthp.cli.signals import exit_code, stopping_on_signals

if TYPE_CHECKING:
    from mthp.lab.sweep import SweepReport

SHOWN_FAILURES = 20


@click.command("sweep")
@click.argument("directory", metavar="DIR", required=False, type=click.Path())
@click.option(
    "--grid", type=click.Path(), metavar="FILE", help="Policies and tunables: a TOML file, which --print-grid shows."
)
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Parquet to write.")
@click.option("--jobs", type=int, metavar="N", help="Processes; one for each processor by default.")
@click.option("--scheduler", metavar="ADDRESS", help="Run on a Dask cluster instead: tcp://HOST:PORT.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@click.option("--print-grid", is_flag=True, help="Print a grid that shows every key, and end.")
@json_option
def command(
    directory: str | None,
    grid: str | None,
    output: Path | None,
    jobs: int | None,
    scheduler: str | None,
    force: bool,
    print_grid: bool,
    as_json: bool,
) -> int:
    """Apply every setting of a grid to every snapshot and recording in DIR, and write the figures to a table.

    The grid, which --print-grid shows, names policies, and lists of values of max_ptes_none, max_ptes_swap,
    max_ptes_shared, mthp_min_order and orders; every combination is a setting. scans = "all" goes on until nothing
    changes, steps = "all" takes every step of recordings. An interrupted sweep continues when it is started again.
    Inputs that cannot be read are reported, and the exit code is 1.
    """
    from mthp.errors import UsageError
    from mthp.lab import runners
    from mthp.lab.grid import example, read_grid
    from mthp.lab.sweep import inputs_in, sweep

    if print_grid:
        click.echo(example(), nl=False)
        return 0
    if directory is None or grid is None or output is None:
        missing = "DIR" if directory is None else "--grid" if grid is None else "--output"
        raise UsageError(
            f"{missing} is missing", help="write mthp sweep DIR --grid FILE -o FILE; --print-grid prints a grid"
        )
    if scheduler is not None and jobs is not None:
        raise UsageError(
            "--jobs and --scheduler exclude each other", help="leave --jobs out: the cluster's workers decide"
        )
    # A wrong grid is reported before the directory is searched.
    settings = read_grid(grid)
    inputs = inputs_in(directory)
    runner = runners.local(jobs) if scheduler is None else runners.dask(scheduler)
    with stopping_on_signals() as stop, progress_bar("sweeping", hidden=as_json) as progress:
        report = sweep(inputs, settings, output, runner, overwrite=force, progress=progress, stop=stop)
    code = exit_code(stop.number) if report.interrupted else 1 if report.failed else 0
    if as_json:
        print_json("sweep", report)
    else:
        _print(console(), report)
    return code


def _print(out: Console, report: SweepReport) -> None:
    if report.interrupted:
        say(
            out,
            f"interrupted: {report.done} of {report.inputs} inputs are done; run the same command again to continue",
        )
    else:
        resumed = f" ({report.resumed} of them by an earlier run)" if report.resumed else ""
        say(
            out,
            f"{report.path}: {report.rows} rows, {report.done} of {report.inputs} inputs{resumed}"
            f" by {report.settings} settings",
        )
    if report.failed:
        shown = [[name, reason] for name, reason in list(report.failed.items())[:SHOWN_FAILURES]]
        out.print(Table(f"Not done: {len(report.failed)}", ["input", "reason"], shown, names={0}))
