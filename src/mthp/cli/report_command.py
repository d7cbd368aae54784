"""``mthp report FILE -o OUT.html``: one page on a process: its address space, and the effect of policies on it."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mthp import __version__
from mthp.addrspace import AddressSpace
from mthp.cli.completing import complete_target
from mthp.cli.options import at_option, json_option, made_of, plan_options
from mthp.cli.render.output import console, print_json, progress_bar, say
from mthp.engine.select import PlanOptions
from mthp.errors import UsageError
from mthp.files import check_output
from mthp.report.document import Command, Document
from mthp.targets import open_target, pid_of, resolve
from mthp.units import format_size

if TYPE_CHECKING:
    from mthp.report.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Written:
    """A page that was written.

    Attributes:
        target: subject of the page.
        path: path of the file.
        bytes: size of the file.
    """

    target: str
    path: Path
    bytes: int


@click.command("report")
@click.argument("file", shell_complete=complete_target)
@click.option(
    "-o", "--output", required=True, metavar="OUT.html", type=click.Path(path_type=Path), help="File to write."
)
@click.option(
    "--after",
    type=click.Path(),
    metavar="FILE",
    help="A snapshot of the same process afterwards, to show beside the first.",
)
@click.option("--force", is_flag=True, help="Replace the output if it exists.")
@click.option(
    "--with-arguments", is_flag=True, help="Show the command line of the process too, which may hold secrets."
)
@at_option
@plan_options
@json_option
def command(
    file: str,
    at: str | None,
    output: Path,
    after: str | None,
    force: bool,
    with_arguments: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Write one HTML page on FILE: its address space, the effect of each policy on it, and the price.

    FILE is a snapshot, a recording, a PID or name of a process for a quick view, the output of `mthp compare --json`,
    or the file of `mthp sweep` or `mthp simulate`. The page is complete in itself: it loads nothing and runs no script.
    It holds no contents of memory, no environment, and no arguments unless requested.
    """
    from mthp.report import load_template, write
    from mthp.report.gather import Source, report_on

    # What may fail without any work fails first.
    check_output(output, overwrite=force)
    # A name of a process is its PID from here on.
    file = str(resolve(file))
    pid = pid_of(file)
    if after is not None and pid_of(resolve(after)) is not None:
        raise UsageError("--after takes a snapshot", help=f"make one with: mthp snapshot {after} -o after.parquet")
    arguments = _arguments(pid) if with_arguments else ""
    load_template()
    document = _on_results(Path(file)) if pid is None else None
    if document is None:
        with (
            still(file, at, hidden=as_json) as (space, recorded_at),
            nullcontext() if after is None else open_target(after) as later,
            progress_bar("reporting", hidden=as_json) as progress,
        ):
            source = Source(space, recorded_at, later, arguments, None if pid is not None else _timeline(file))
            wanted, commands = made_of(PlanOptions, options), _commands(file, pid)
            document = report_on(source, wanted, commands, lambda done, total, _: progress(done, total))
    size = write(document, output, overwrite=force, version=__version__)
    if as_json:
        print_json("report", Written(document.title, output, size))
    else:
        say(console(), f"{output}: {document.title}, {format_size(size)}; open it in any browser")


def _on_results(path: Path) -> Document | None:
    """Return the report on the file at `path` if it has results; None for snapshots and recordings.

    Files are recognised by their contents, because their names may have any suffix.
    """
    from mthp.lab import swept
    from mthp.lab.simulated import is_simulated, read
    from mthp.report.comparisons import is_json, report_on_comparison
    from mthp.report.simulations import report_on_simulation
    from mthp.report.sweeps import report_on_sweep

    # Results have no plan to carry out, so the only command is that for the page.
    commands = (_this_page(),)
    if is_simulated(path):
        found = read(path)
        return report_on_simulation(found.rows, found.about, commands)
    if swept.is_sweep(path):
        rows = swept.read(path)
        return report_on_sweep(path, rows, swept.summed(rows), swept.geometry_of(rows), commands)
    return report_on_comparison(path, commands) if is_json(path) else None


@contextmanager
def still(target: str, at: str | None, *, hidden: bool) -> Iterator[tuple[AddressSpace, str]]:
    """Yield the address space of `target` at one moment, and that moment in words; a process is recorded first."""
    from mthp.snapshot import load, record

    if pid_of(target) is None:
        with open_target(target, at=at) as space:
            yield space, _when(space)
        return
    with tempfile.TemporaryDirectory(prefix="mthp-report-") as directory:
        # mthp's own format needs no package.
        path = Path(directory) / "now.mthp"
        with open_target(target, at=at) as live, progress_bar("recording", hidden=hidden) as progress:
            record(live, path, progress=progress)
        with load(path) as recorded:
            yield recorded, datetime.now(UTC).isoformat(timespec="seconds")


def _when(space: AddressSpace) -> str:
    """Return the time of a file's contents, in words."""
    from mthp.snapshot import SnapshotSpace
    from mthp.snapshot.recording import RecordingSpace

    if isinstance(space, RecordingSpace):
        return f"step {space.step.number} of a recording, {space.step.seconds:g} s after its first"
    assert isinstance(space, SnapshotSpace)
    return space.info.recorded_at


def _timeline(path: str) -> Timeline | None:
    """Return the timeline of the file at `path` if it is a recording, else None."""
    from mthp.report.timeline import chosen_steps, gather
    from mthp.snapshot.recording import Recording
    from mthp.snapshot.stream import is_recording

    if not is_recording(path):
        return None
    recording = Recording(path)
    chosen = set(chosen_steps(len(recording.steps)))
    return gather(
        ((space.step.seconds, space) for space in recording.walk() if space.step.number in chosen), recording.trouble
    )


def _arguments(pid: int | None) -> str:
    """Return the command line of a process, quoted for a shell.

    Raises:
        UsageError: it is not a process.
    """
    if pid is None:
        raise UsageError("--with-arguments needs a PID: files hold no arguments")
    from mthp.linux.process import Process

    with Process(pid) as process:
        # Each argument ends with a null byte (proc_pid_cmdline(5)).
        words = process.read("cmdline").rstrip(b"\0").split(b"\0")
    return shlex.join(word.decode(errors="replace") for word in words)


def _this_page() -> Command:
    return Command("This page", shlex.join(["mthp", *sys.argv[1:]]))


def _commands(file: str, pid: int | None) -> tuple[Command, ...]:
    """Return the commands that repeat the report and carry out its plan."""
    if pid is None:
        name = shlex.quote(file)
        return (
            _this_page(),
            Command("The plan", f"mthp plan {name}"),
            Command("Carry it out on a live process, within a budget", "mthp collapse PID --max-bloat 5%"),
        )
    return (
        _this_page(),
        Command("The same memory in a file, to inspect it again", f"mthp snapshot {pid} -o before.parquet"),
        Command("Carry the plan out, within a budget", f"mthp collapse {pid} --max-bloat 5%"),
        Command("Record the result", f"mthp snapshot {pid} -o after.parquet"),
        Command(
            "Compare it with the state before", "mthp report before.parquet --after after.parquet -o collapse.html"
        ),
    )
