"""``mthp record PID -o FILE``: a process over time; ``--from-trace``: a recording made of a trace of accesses."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.status import Status
from rich.text import Text

from mthp.cli.options import SECONDS, SHARE, json_option
from mthp.cli.output import console, note, percent, print_json, say
from mthp.cli.signals import exit_code, stopping_on_signals
from mthp.errors import UsageError
from mthp.targets import open_target, pid_of
from mthp.text import clean
from mthp.units import format_size

STRETCHED = 1.5
"""From so many times the wanted interval on, a person is told that steps came later."""


@click.command("record")
@click.argument("target", required=False)
@click.option("-o", "--output", required=True, metavar="FILE", type=click.Path(path_type=Path), help="File to write.")
@click.option("--every", type=SECONDS, default="1s", show_default=True, help="From one step to the next.")
@click.option("--for", "duration", type=SECONDS, help="How long; until Ctrl-C or the target's end by default.")
@click.option(
    "--cpu",
    type=SHARE,
    default="2%",
    show_default=True,
    help="Of one processor, which recording may take; steps come later where they would take more. 100% for no bound.",
)
@click.option(
    "--from-trace", metavar="FILE", help="Make the recording of a trace of memory accesses, not of a process."
)
@click.option("--trace-format", metavar="KIND", help="lackey, perf or damon; found out by default.")
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@json_option
def command(
    target: str | None, output: Path, from_trace: str | None, trace_format: str | None, as_json: bool, **options: Any
) -> int:
    """Record which pages of TARGET are mapped, and how, again and again: what changed from step to step.

    Stops at Ctrl-C, after --for, or when the target exits. What was written can be read whatever becomes of the
    recorder. `mthp inspect`, `plan`, `compare` and `report` take the file in place of a PID, at the step --at. It
    holds no contents of memory, no environment and no arguments.
    """
    if from_trace is not None:
        if target is not None:
            raise UsageError(f"both a target ({target}) and --from-trace {from_trace}", help="give one of them")
        _from_trace(from_trace, trace_format, output, as_json=as_json, force=options["force"])
        return 0
    if target is None:
        raise UsageError("nothing to record was named", help="give a PID, or --from-trace FILE")
    if trace_format is not None:
        raise UsageError("--trace-format is of no use without --from-trace")
    return _record(target, output, as_json=as_json, **options)


def _record(
    target: str, output: Path, *, every: float, duration: float | None, cpu: float, force: bool, as_json: bool
) -> int:
    from mthp.snapshot.recorder import Pace, record_series

    if pid_of(target) is None:
        raise UsageError(f"{target!r} is no process", help="record takes a PID, or the word self")
    pace = Pace(every=every, duration=duration, cpu=None if cpu >= 1 else cpu)
    err = Console(stderr=True)
    with open_target(target) as space, stopping_on_signals() as stop, Status("recording", console=err) as status:
        if as_json or not err.is_terminal:
            status.stop()

        def told(steps: int, at: float, size: int) -> None:
            line = f"recording {space.label}: {steps} steps, {at:.0f} s, {format_size(size)}; Ctrl-C ends it"
            status.update(Text(clean(line)))

        done = record_series(space, output, pace, stop=stop, overwrite=force, told=told)
    # Ctrl-C is how a recording without --for is ended.
    code = 0 if stop.number in (0, signal.SIGINT) else exit_code(stop.number)
    if as_json:
        print_json("record", done)
        return code
    out = console()
    say(
        out,
        f"{done.path}: {done.label}, {done.steps} steps over {done.seconds:.1f} s, {format_size(done.bytes)};"
        f" {done.cpu_seconds:.2f} s of processor time; ended because {_why(done.end)}",
    )
    if done.interval > STRETCHED * pace.every:
        lines = [f"steps came every {done.interval:.1f} s, not {pace.every:g} s: --cpu {percent(cpu)} allows no more"]
        note(out, lines)
    note(out, done.missing)
    return code


def _why(end: str) -> str:
    return "it was stopped" if end == "stopped" else end


def _from_trace(trace: str, kind: str | None, output: Path, *, as_json: bool, force: bool) -> None:
    from mthp.cli.output import progress_bar
    from mthp.snapshot.fromtrace import record_trace

    with progress_bar("reading the trace", hidden=as_json) as progress:
        done = record_trace(trace, output, kind=kind, overwrite=force, progress=progress)
    if as_json:
        print_json("record", done)
        return
    say(
        console(),
        f"{done.path}: {done.label}, {done.accesses} accesses to {done.pages} pages in {done.steps} steps,"
        f" {format_size(done.bytes)}",
    )
