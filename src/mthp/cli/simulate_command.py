"""``mthp simulate SCENARIO.toml``: programs and khugepaged on a simulated machine, and the results."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mthp import __version__
from mthp.cli.completing import complete_policies
from mthp.cli.options import json_option
from mthp.cli.render.forecast import Forecast
from mthp.cli.render.output import console, note, print_json, progress_bar, say
from mthp.cli.render.tables import Table
from mthp.cli.signals import Wish, exit_code, stopping_on_signals
from mthp.errors import UsageError
from mthp.files import check_output
from mthp.text import numbered
from mthp.units import format_size, percent

if TYPE_CHECKING:
    from mthp.lab.scenariotables import Scenario
    from mthp.lab.simulated import Outcome

WANTED = 0.5
"""The coverage until which the time is printed."""


@click.command("simulate")
@click.argument("scenario", required=False, type=click.Path(path_type=Path))
@click.option(
    "--policies",
    metavar="NAMES",
    shell_complete=complete_policies,
    help="Run once under each, separated by commas; the scenario's by default. NAME:split is mthp by splitting.",
)
@click.option("--seed", type=int, metavar="N", help="Seed in place of the scenario's.")
@click.option("-o", "--output", metavar="FILE", type=click.Path(path_type=Path), help="Write the rows as Parquet.")
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option("--print-scenario", is_flag=True, help="Print a scenario that shows every key, and end.")
@json_option
def command(
    scenario: Path | None,
    policies: str | None,
    seed: int | None,
    output: Path | None,
    force: bool,
    print_scenario: bool,
    as_json: bool,
) -> int:
    """Run programs, as SCENARIO.toml describes them, on a simulated machine with khugepaged.

    The machine behaves page for page as a real kernel; time is simulated, and the same seed produces the same rows to
    the byte. `mthp report` shows the output. Ctrl-C ends the run and keeps the rows so far.
    """
    from mthp.lab import simulated
    from mthp.lab.scenario import example, load_scenario

    if print_scenario:
        click.echo(example(), nl=False)
        return 0
    if scenario is None:
        raise UsageError("no scenario was named", help="mthp simulate --print-scenario prints one that shows every key")
    if seed is not None and seed < 0:
        raise UsageError(f"--seed {seed} is below 0")
    if output is not None:
        check_output(output, overwrite=force)
    loaded = load_scenario(scenario)
    names = [loaded.settings.policy] if policies is None else _names(policies)
    with stopping_on_signals() as stop:
        outcomes = _run(loaded, names, seed, stop, hidden=as_json)
    run_seed = loaded.settings.seed if seed is None else seed
    if output is not None:
        simulated.write(output, outcomes, simulated.about(loaded, run_seed, names, __version__), overwrite=force)
    interrupted = outcomes[-1].interrupted
    if as_json:
        print_json("simulate", simulated.Simulation(loaded, run_seed, names, outcomes))
    else:
        _print(loaded, outcomes)
        if output is not None:
            console().print()
            say(console(), f"{output}: see it with: mthp report {output} -o simulation.html")
    return exit_code(stop.number) if interrupted else 0


def _run(scenario: Scenario, names: list[str], seed: int | None, stop: Wish, *, hidden: bool) -> list[Outcome]:
    """Return the outcome under each policy; of an interrupted run, and of those before it."""
    from mthp.lab.simulation import simulate

    outcomes: list[Outcome] = []
    forecast = Forecast("the simulation", "Ctrl-C ends it and keeps the rows so far")
    with progress_bar("simulating", hidden=hidden) as progress:

        def shown(done: float, total: float) -> None:
            done, total = len(outcomes) * total + done, total * len(names)
            forecast(done, total)
            # The bar takes whole numbers.
            progress(int(1000 * done), int(1000 * total))

        for name in names:
            outcomes.append(simulate(scenario, policy=name, seed=seed, progress=shown, stop=stop))
            if outcomes[-1].interrupted:
                break
    return outcomes


def _names(text: str) -> list[str]:
    from mthp.lab.makers import known_maker

    names = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not names:
        raise UsageError("--policies names none")
    # All are checked before the first run, which may take long.
    return [known_maker(name) for name in names]


def _print(scenario: Scenario, outcomes: list[Outcome]) -> None:
    out = console()
    settings, pmd = scenario.settings, scenario.geometry.label(scenario.geometry.pmd_order)
    say(
        out,
        f"{Path(scenario.path).name}: {format_size(scenario.machine.memory)} of memory,"
        f" {numbered(outcomes[0].last['processes'], 'process', 'processes')}, {settings.duration:g} s",
    )
    heads = ["policy", f"{pmd} mapped", "large folios", "resident", "bloat", "copied", "khugepaged", "not allocated"]
    rows = [_cells(outcome) for outcome in outcomes]
    columns = [*heads, f"{WANTED:.0%} after", "killed"]
    if scenario.trim is not None:
        columns.append("given back")
        rows = [
            [*row, format_size(outcome.last["given_back_bytes"])] for row, outcome in zip(rows, outcomes, strict=True)
        ]
    out.print(Table("At the end", columns, rows, right=set(range(1, len(columns)))))
    for outcome in outcomes:
        last = [row for row in outcome.rows if row["seconds"] == outcome.last["seconds"] and row["process"]]
        cells = [
            [
                row["process"],
                format_size(row["resident_bytes"]),
                percent(row["huge_coverage"]),
                percent(row["large_coverage"]),
            ]
            for row in last
        ]
        heads = ["process", "resident", f"{pmd} mapped", "large folios"]
        out.print(Table(f"Processes under {outcome.policy}", heads, cells, right={1, 2, 3}, names={0}))
    if outcomes[-1].interrupted:
        note(out, [f"interrupted after {outcomes[-1].last['seconds']:g} s"])


def _cells(outcome: Outcome) -> list[Any]:
    last = outcome.last
    reached = outcome.time_to_coverage(WANTED)
    return [
        outcome.policy,
        percent(last["huge_coverage"]),
        percent(last["large_coverage"]),
        format_size(last["resident_bytes"]),
        format_size(last["bloat_bytes"]),
        format_size(last["copied_bytes"]),
        f"{last['khugepaged_seconds']:.2f} s",
        percent(last["alloc_failure_share"]),
        "never" if math.isinf(reached) else f"{reached:g} s",
        str(last["killed"]),
    ]
