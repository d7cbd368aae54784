"""``python -m vm``: the kernel lab's command line."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import click

from live.khugepaged_selftest import UnobtainableError
from mthp.sim.golden.cases import read_cases
from vm.apt import LabError, cache_directory
from vm.fuzz import KINDS, Findings, fuzz, write_cases
from vm.guest import Job, run
from vm.kernels import OTHERS, SERIES, Kernel, fetch
from vm.matrix import GUEST_SECONDS, SETUP, Row, examine, live_files, saved, skips, table
from vm.selftest import in_guest
from vm.tools import programs_with_libraries

GOLDEN = Path(__file__).resolve().parents[1] / "golden"

KERNELS = click.option(
    "-k",
    "--kernel",
    "names",
    multiple=True,
    metavar="NAME",
    help=f"A kernel, such as 7.3 or 7.3-arm64-16k. May be repeated.  [default: {', '.join((*SERIES, *OTHERS))}]",
)

KIND = click.option(
    "--kind",
    type=click.Choice(list(KINDS)),
    default="random",
    show_default=True,
    help="Cases: random scans, scans with rare combinations of states, or splits and trims.",
)


class Lab(click.Group):
    """The group of commands. A LabError ends it with a message."""

    def invoke(self, context: click.Context) -> object:
        try:
            return super().invoke(context)
        except LabError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(3)


@click.group(cls=Lab)
def main() -> None:
    """Boot real kernels, test mthp on them, and compare the simulated machine with them."""


@main.command()
@KERNELS
def kernels(names: tuple[str, ...]) -> None:
    """Fetch and unpack kernels, and print their releases."""
    for name in names or (*SERIES, *OTHERS):
        kernel = fetch(name)
        note = "" if kernel.modules else "  (its modules are gone from the archive: no swap)"
        click.echo(f"{name:16} {kernel.release}{note}")


@main.command("run")
@KERNELS
@click.option("--seconds", default=120.0, show_default=True, help="Time limit.")
@click.option("--memory", "memory_mb", default=1024, show_default=True, help="Memory of the guest, in MiB.")
@click.option("--cpus", default=1, show_default=True, help="Processors of the guest.")
@click.option("--python", "with_python", is_flag=True, help="Give the guest Python, and mthp with its tests in /mthp.")
@click.option("--file", "paths", multiple=True, type=click.Path(path_type=Path, exists=True), help="Copy it to /job.")
@click.option("--program", "programs", multiple=True, metavar="NAME", help="A program of this machine to copy.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Directory for the files of /out.")
@click.argument("script")
def run_command(
    names: tuple[str, ...],
    seconds: float,
    memory_mb: int,
    cpus: int,
    with_python: bool,
    paths: tuple[Path, ...],
    programs: tuple[str, ...],
    output: Path | None,
    script: str,
) -> None:
    """Run the shell SCRIPT in a guest, and copy the files that it leaves in /out."""
    job = Job(
        "export PATH=/job/bin:$PATH\n" + (SETUP if with_python else "") + script,
        files=programs_with_libraries(programs) | {path.name: path.read_bytes() for path in paths},
        with_python=with_python,
        seconds=seconds,
        memory_mb=memory_mb,
        cpus=cpus,
    )
    for name in names or SERIES[-1:]:
        outcome = run(fetch(name), job, echo=True)
        for path, data in outcome.files.items():
            if output:
                place = output / name / path
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)
        if outcome.exit_code != 0:
            click.echo("the time limit ended it" if outcome.timed_out else f"exit code {outcome.exit_code}", err=True)
            sys.exit(1)


@main.command()
@KERNELS
@click.option("--cases", default=500, show_default=True, help="Number of cases for each kernel.")
@click.option("--seed", default=1, show_default=True)
@click.option("--seconds", default=1200.0, show_default=True, help="Time limit for each kernel.")
@KIND
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Directory of the golden files.")
def record(names: tuple[str, ...], cases: int, seed: int, seconds: float, kind: str, output: Path) -> None:
    """Record golden cases, one file for each kernel, and replay each at once."""
    _each(
        names or ("7.3",),
        lambda kernel: fuzz(kernel, seed=seed, cases=cases, seconds=seconds, say=_say, kind=kind, shrink=False),
        output,
        kind,
    )


@main.command("fuzz")
@KERNELS
@click.option("--minutes", default=10.0, show_default=True, help="Minutes for each kernel.")
@click.option("--seed", default=1, show_default=True)
@KIND
@click.option(
    "-o",
    "--output",
    default=cache_directory() / "found",
    type=click.Path(path_type=Path),
    help="Directory for the cases that differ.  [default: found, in the lab's cache]",
)
def fuzz_command(names: tuple[str, ...], minutes: float, seed: int, kind: str, output: Path) -> None:
    """Compare random cases for some minutes; save the smallest variant of each that differs."""
    _each(
        names or ("7.3",),
        lambda kernel: fuzz(kernel, seed=seed, cases=1 << 30, seconds=60 * minutes, say=_say, kind=kind),
        output,
        kind,
        only_differing=True,
    )


@main.command()
@KERNELS
@click.option(
    "--tests", multiple=True, metavar="WORD", help="Only files of live tests with it in their names, or `none`."
)
@click.option("--smoke/--no-smoke", default=True, show_default=True, help="Run mthp's commands on a small target.")
@click.option("--resume", is_flag=True, help="Leave out tests that passed or were skipped there before.")
@click.option("--seconds", default=GUEST_SECONDS, show_default=True, help="Time limit of each guest.")
@click.option("--verbose", is_flag=True, help="Show the output of the guests.")
def matrix(
    names: tuple[str, ...], tests: tuple[str, ...], smoke: bool, resume: bool, seconds: float, verbose: bool
) -> None:
    """Run mthp's commands and live tests on kernels, and print the results as a table."""
    rows = []
    files = live_files(tests)
    for name in names or (*SERIES, *OTHERS):
        kernel = fetch(name)
        _say(f"{name}: booting {kernel.release}")
        row = _known(kernel, files, again=not resume)
        rows.append(examine(kernel, files, smoke=smoke, row=row, seconds=seconds, echo=verbose, keep=True, say=_say))
    _show(rows)


@main.command("table")
@KERNELS
def show_table(names: tuple[str, ...]) -> None:
    """Print the results of the last run of `matrix` on each kernel."""
    _show([row for name in names or (*SERIES, *OTHERS) if (row := saved(name))])


def _known(kernel: Kernel, files: list[str], *, again: bool) -> Row:
    """Return the kept results of a kernel without those to run: those of `files` if `again`, or those that failed."""
    row = saved(kernel.name)
    if row is None or row.release != kernel.release:
        return Row(kernel.name, kernel.release)
    row.seconds *= not again
    chosen = {name for name in row.tests if name.partition("::")[0].rpartition("/")[2] in files}
    row.tests = {
        name: test
        for name, test in row.tests.items()
        if name not in chosen or (not again and test.outcome in ("passed", "skipped"))
    }
    return row


def _show(rows: list[Row]) -> None:
    """Print the table, the reasons of skips, and the failures; exit with 1 if a test failed."""
    _say(table(rows))
    _say(skips(rows))
    failures = [f"{row.name}: {failure}" for row in rows for failure in row.failures]
    for failure in failures:
        _say(failure)
    sys.exit(1 if failures else 0)


@main.command("selftest")
@KERNELS
@click.option("--order", "orders", multiple=True, type=int, default=(4,), show_default=True)
@click.option("--mechanism", default="move", show_default=True, help="Mechanism of the daemon.")
def run_selftest(names: tuple[str, ...], orders: tuple[int, ...], mechanism: str) -> None:
    """Run Linux's own test of khugepaged with mthp's daemon in place of the kernel's khugepaged."""
    try:
        codes = [in_guest(fetch(name), orders, mechanism) for name in names or ("7.3",)]
    except UnobtainableError as error:
        raise LabError(str(error)) from None
    sys.exit(1 if any(codes) or None in codes else 0)


@main.command()
@click.argument("files", nargs=-1, type=click.Path(exists=True, path_type=Path))
def states(files: tuple[Path, ...]) -> None:
    """Count the golden cases in which each state occurs, by kernel.  [default: all of tests/golden]"""
    counts: dict[str, Counter[str]] = {"all cases": Counter()}
    for file in files or sorted(GOLDEN.glob("*.jsonl.gz")):
        for case in read_cases(file):
            kernel = case.get("kernel", "7.3.4") + (f" {case['geometry']}" if "geometry" in case else "")
            counts["all cases"][kernel] += 1
            for state in {state.partition(":")[0] for state, _ in case["before"]}:
                counts.setdefault(state, Counter())[kernel] += 1
    kernels = sorted(counts["all cases"])
    _say("".join(f"{word:>18}" for word in ("", *kernels, "in all")))
    for state, found in sorted(counts.items(), key=lambda each: -each[1].total()):
        _say(f"{state:>18}" + "".join(f"{found[kernel]:18}" for kernel in kernels) + f"{found.total():18}")


def _each(
    names: tuple[str, ...], work: Callable[[Kernel], Findings], output: Path, kind: str, *, only_differing: bool = False
) -> None:
    """Do the work for every kernel, write its cases, and exit with 1 if any differ."""
    differing = 0
    for name in names:
        kernel = fetch(name)
        found = work(kernel)
        differing += len(found.mismatches)
        _say(f"{kernel.release}: {found.summary}")
        for state, count in sorted(found.states.items()):
            _say(f"  {state:16} {count}")
        for reason, count in found.refused.most_common(5):
            _say(f"  refused {count}: {reason}")
        platform = "" if kernel.platform.name == "x86-64" else f"-{kernel.platform.name}"
        stem = f"linux-{kernel.version}{platform}"
        cases = [case for case, _ in found.mismatches] if only_differing else found.cases
        kept = {
            output / f"{stem}-{kind}.jsonl.gz": cases,
            # In a directory of its own, because a replay of these cases differs.
            output / "unstable" / f"{stem}-{kind}.jsonl.gz": [case for case, _ in found.unstable],
        }
        for path, chosen in kept.items():
            if chosen:
                write_cases(path, chosen)
                _say(f"  {path}")
    sys.exit(1 if differing else 0)


def _say(text: str) -> None:
    click.echo(text)


if __name__ == "__main__":
    main(prog_name="python -m vm")
