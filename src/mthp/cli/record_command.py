"""``mthp record PID -o FILE``: a process over time; ``--from-trace``: a recording made of a trace of accesses."""

from __future__ import annotations

import importlib.util
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import click
from rich.console import Console
from rich.status import Status
from rich.text import Text

from mthp.abilities import heat_of
from mthp.cli.completing import complete_target
from mthp.cli.options import SECONDS, SHARE, heat_option, json_option
from mthp.cli.render.output import console, note, print_json, say
from mthp.cli.render.tables import Table
from mthp.cli.several import Each, Failed, do_each, print_each
from mthp.cli.signals import exit_code, stopping_on_signals
from mthp.errors import UsageError
from mthp.heat import HeatRequest
from mthp.naming import HOW_TO_NAME
from mthp.snapshot.recorder import OVER, Pace, Recorded, record_series
from mthp.targets import Found, Targets, find_targets, pid_of
from mthp.text import clean, numbered
from mthp.units import format_size, percent

STRETCHED = 1.5
"""Ratio of the actual to the requested interval, from which on late steps are reported."""


@click.command("record")
@click.argument("targets", nargs=-1, metavar="[TARGET]...", shell_complete=complete_target)
@click.option("-o", "--output", required=True, metavar="FILE", type=click.Path(path_type=Path), help="File to write.")
@click.option("--every", type=SECONDS, default="1s", show_default=True, help="Time between two steps.")
@click.option("--for", "duration", type=SECONDS, help="Duration; until Ctrl-C or the target's end by default.")
@click.option(
    "--cpu",
    type=SHARE,
    default="2%",
    show_default=True,
    help="Share of one processor that recording may use; steps are delayed if they would use more. 100% for no bound.",
)
@click.option(
    "--from-trace",
    type=click.Path(),
    metavar="FILE",
    help="Convert a trace of memory accesses to a recording, instead of recording a process.",
)
@click.option(
    "--trace-format", metavar="KIND", help="lackey, perf or damon; by default recognised from its first lines."
)
@heat_option
@click.option("--force", is_flag=True, help="Replace the file if it exists.")
@json_option
def command(
    targets: tuple[str, ...],
    output: Path,
    from_trace: str | None,
    trace_format: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Record repeatedly which pages of each TARGET are mapped, and how: the changes from step to step.

    A TARGET is a PID, the word self, or a name as `mthp --help` lists them. Several processes are recorded side by
    side; FILE is then a directory, with a file for each.

    Stops at Ctrl-C, after --for, or when the target exits. A file can be read even if the recorder was killed. `mthp
    inspect`, `plan`, `compare` and `report` take the file in place of a PID, at the step --at. It holds no contents of
    memory, no environment and no arguments. FILE is an Arrow stream, which needs pyarrow; if its name ends with .mthp,
    it is in mthp's own format, which needs no package.
    """
    if from_trace is not None:
        if targets:
            raise UsageError(f"both a target ({targets[0]}) and --from-trace {from_trace}", help="use one of them")
        _from_trace(from_trace, trace_format, output, as_json=as_json, force=options["force"])
        return 0
    if not targets:
        raise UsageError("no target was named", help=f"{HOW_TO_NAME}; or --from-trace FILE")
    if trace_format is not None:
        raise UsageError("--trace-format needs --from-trace")
    return _record(targets, output, as_json=as_json, **options)


def _record(
    targets: tuple[str, ...],
    output: Path,
    *,
    every: float,
    duration: float | None,
    cpu: float,
    force: bool,
    heat: HeatRequest | None,
    as_json: bool,
) -> int:
    named = find_targets(targets)
    if heat is not None and not named.single:
        raise UsageError("--heat works with one target only", help="record each target separately")
    for found in named.found:
        # Checked for all before the first recording begins.
        if pid_of(found.target) is None:
            raise UsageError(f"{found.label!r} is not a process", help="record takes a PID, self, or a name")
    err = Console(stderr=True)
    with stopping_on_signals() as stop, Status("recording", console=err) as status:
        if as_json or not err.is_terminal:
            status.stop()
        recorder = _Recorder(output, every, duration, cpu, force, status, heat)
        each = recorder.record_each(named, stop)
    # Ctrl-C is the normal end of a recording without --for.
    code = 0 if stop.number in (0, signal.SIGINT) else exit_code(stop.number)
    late = dict.fromkeys(_late(done, duration, cpu) for done in each.done)
    if as_json:
        print_json("record", each.done[0] if each.single else Recordings(each.all))
    elif each.single:
        _print_one(console(), each.done[0], *late)
    else:
        print_each(each, targets_table(each), list(late))
    return code or each.code


class _Recorder:
    """Records processes, each in a thread of its own if there are several."""

    def __init__(
        self,
        output: Path,
        every: float,
        duration: float | None,
        cpu: float,
        force: bool,
        status: Status,
        heat: HeatRequest | None,
    ) -> None:
        self._output, self._every, self._duration = output, every, duration
        self._cpu, self._force, self._status, self._heat = cpu, force, status, heat

    def record(self, found: Found, path: Path, stop: Callable[[], bool], among: int = 1) -> Recorded:
        # The bound holds for all recordings together.
        pace = Pace(every=self._every, duration=self._duration, cpu=None if self._cpu >= 1 else self._cpu / among)

        def progress(steps: int, at: float, size: int) -> None:
            line = f"recording {space.label}: {steps} steps, {at:.0f} s, {format_size(size)}; Ctrl-C ends it"
            self._status.update(Text(clean(line)))

        # Processor time by thread, so that each counts only its own.
        spent = time.process_time if among == 1 else time.thread_time
        with found.open() as space:
            # Noted before the first step, and kept with all steps.
            heat = heat_of(space, self._heat, stop)
            return record_series(
                space, path, pace, stop=stop, overwrite=self._force, heat=heat, progress=progress, cpu_clock=spent
            )

    def record_each(self, named: Targets, stop: Callable[[], bool]) -> Each[Recorded]:
        """Record all processes side by side, each into a file of its own in a directory unless there is one target.

        Raises:
            UsageError: the directory cannot be made.
        """
        if named.single:
            return do_each(named, lambda found: (self.record(found, self._output, stop), 0))
        try:
            self._output.mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"{self._output} is not a directory that can be made: {error.strerror}",
                help="several targets are recorded into a directory, a file for each",
            ) from error
        with ThreadPoolExecutor(max(1, len(named.found))) as pool:
            # All begin before the first is awaited.
            started = {
                found.target: pool.submit(self.record, found, self._path(found), stop, len(named.found))
                for found in named.found
            }
            return do_each(named, lambda found: (started[found.target].result(), 0))

    def _path(self, found: Found) -> Path:
        # A process chooses its name, which may have slashes. The PID keeps file names apart.
        comm = re.sub(r"[^A-Za-z0-9._-]", "_", found.facts.comm) if found.facts else "process"
        # The name decides the format, and mthp's own needs no package.
        suffix = "arrows" if importlib.util.find_spec("pyarrow") else "mthp"
        return self._output / f"{found.target}-{comm}.{suffix}"


@dataclass(frozen=True, slots=True)
class Recordings:
    """The results of the recordings of several processes.

    Attributes:
        targets: the result of each, or its error.
    """

    targets: tuple[Recorded | Failed, ...]

    JSON: ClassVar = "targets steps bytes cpu_seconds"

    @property
    def _done(self) -> list[Recorded]:
        return [each for each in self.targets if not isinstance(each, Failed)]

    @property
    def steps(self) -> int:
        """The number of steps of all recordings."""
        return sum(each.steps for each in self._done)

    @property
    def bytes(self) -> int:
        """The size of all files, in bytes."""
        return sum(each.bytes for each in self._done)

    @property
    def cpu_seconds(self) -> float:
        """The processor time of all threads, in seconds."""
        return sum(each.cpu_seconds for each in self._done)


def targets_table(each: Each[Recorded]) -> Table:
    """Return a table with a line for each recording, and their sum."""
    total = Recordings(each.all)
    columns = ["target", "steps", "bytes", "path", "service", "reason"]
    rows = each.lines(
        lambda found, done: [
            done.label,
            str(done.steps),
            format_size(done.bytes),
            done.path,
            found.service,
            "" if done.end == "stopped" else done.end,
        ],
        len(columns),
    )
    rows.append(["in all", str(total.steps), format_size(total.bytes), "", "", ""])
    return Table(each.counted, columns, rows, right={1, 2}, names={0, 3, 4})


def _print_one(out: Console, done: Recorded, late: str) -> None:
    say(
        out,
        f"{done.path}: {done.label}, {numbered(done.steps, 'step')} over {done.seconds:.1f} s,"
        f" {format_size(done.bytes)}; {done.cpu_seconds:.2f} s of processor time; ended because {_why(done.end)}",
    )
    note(out, [late, *done.missing])


def _late(done: Recorded, duration: float | None, cpu: float) -> str:
    """Return the remark that steps came later than requested; ``""`` if they came in time."""
    allows = f"--cpu {percent(cpu)} allows no more"
    if done.end == OVER and done.steps == 1 and duration is not None and duration > STRETCHED * done.every:
        return f"no second step fitted into {duration:g} s: {allows}"
    if done.interval > STRETCHED * done.every:
        return f"steps came every {done.interval:.1f} s, not {done.every:g} s: {allows}"
    return ""


def _why(end: str) -> str:
    return "it was stopped" if end == "stopped" else end


def _from_trace(trace: str, kind: str | None, output: Path, *, as_json: bool, force: bool) -> None:
    from mthp.cli.render.output import progress_bar
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
