"""``mthp explain TARGET [ADDRESS]``: why memory is not in large folios, in sentences."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import click

from mthp.addrspace import AddressSpace
from mthp.cli.asking import ask_daemon, of_this_version, run_dir_option
from mthp.cli.options import SECONDS, at_option, json_option, target_argument
from mthp.cli.render.output import console, note, print_json, progress_bar, say
from mthp.engine.explain import Explanation, explain_space
from mthp.errors import MthpError, UsageError
from mthp.linux.kernel_scans import watch_scans
from mthp.linux.processspace import ProcessSpace
from mthp.targets import open_target, pid_of, resolve
from mthp.units import format_size


@dataclass(frozen=True, slots=True)
class History:
    """The history of the memory of a process.

    Attributes:
        happened: events, as sentences.
    """

    JSON: ClassVar = "happened"

    happened: tuple[str, ...]


@click.command("explain")
@target_argument
@click.argument("address", required=False)
@click.option(
    "--watch",
    type=SECONDS,
    help="Time for which to watch khugepaged and MADV_COLLAPSE there, such as 30s, by the kernel's tracepoints.",
)
@at_option
@run_dir_option
@json_option
def command(
    target: str, address: str | None, watch: float | None, at: str | None, run_dir: Path | None, as_json: bool
) -> None:
    """Explain the state of TARGET's memory: the effect of each policy, refusals, and history.

    With ADDRESS (in hex) it explains only the PMD range around it. Nothing is changed.
    """
    number = None if address is None else _number(address)
    # Once, so that space and daemon have the same process, which a name may not fit later.
    chosen = resolve(target)
    with open_target(chosen, at=at) as space:
        explanation = explain_space(space, number)
        seen = [] if watch is None else _watched(space, number, watch)
    # The daemon works on processes only, not on files.
    pid = pid_of(chosen)
    history = History((*([] if pid is None else _daemon_says(pid, run_dir)), *seen))
    if as_json:
        print_json("explain", explanation, history)
        return
    _print(explanation, history)


def _number(text: str) -> int:
    # int() would also take blanks, underscores and digits of other scripts. Errors print no more than this.
    if not re.fullmatch("(0[xX])?[0-9a-fA-F]{1,16}", text):
        raise UsageError(f"{text[:40]!r} is not an address", help="write it in hex: 0x7f0000000000, as inspect does")
    return int(text, 16)


def _print(explanation: Explanation, history: History) -> None:
    out = console()
    parts: list[tuple[str, list[str]]] = [
        ("Memory", list(explanation.memory)),
        ("Effect of policies", explanation.predicted),
        ("Refusals", [each.sentence for each in explanation.refusals] or ["none"]),
        ("History", list(history.happened)),
    ]
    say(out, explanation.label)
    for title, lines in parts:
        if lines:
            say(out, f"{title}:")
            for line in lines:
                say(out, f"  {line}")
    note(out, explanation.missing)


def _watched(space: AddressSpace, address: int | None, seconds: float) -> list[str]:
    """Return the kernel's observed actions, in sentences."""
    if not isinstance(space, ProcessSpace):
        raise UsageError("--watch needs a process that runs, not a file", help="leave --watch out")
    size = space.geometry.pmd_size
    within = None if address is None else (address // size * size, address // size * size + size)
    with progress_bar(f"watching {space.label}") as progress:
        return watch_scans(space, seconds, within=within, progress=progress).sentences


def _daemon_says(pid: int, run_dir: Path | None) -> Iterator[str]:
    """Yield sentences on the running daemon's work in a process, and why it left memory alone."""
    try:
        status = ask_daemon("status", run_dir)
        with of_this_version():
            yield from _of_target(next((each for each in status["targets"] if each["pid"] == pid), None))
    # Without the daemon the rest of the explanation still holds.
    except MthpError as error:
        yield error.message


def _of_target(target: dict[str, Any] | None) -> Iterator[str]:
    if target is None:
        yield "no rule of the running daemon matches this process"
        return
    collapsed, bloat = (format_size(target[key]) for key in ("collapsed_bytes", "bloat_bytes"))
    yield f"the daemon works on it by rule {target['rule']!r}: it collapsed {collapsed} and added {bloat}"
    if target["left_out"]:
        yield f"the daemon leaves it out for now: {target['left_out']}"
    yield from (f"the daemon tried {count} times in vain: {reason}" for reason, count in target["reasons"].items())
    for name, count in target["collapse_failures"].items():
        yield f"{count} attempts of the daemon failed: {name}"
    sizes: Counter[str] = Counter()
    for left in target["left_alone"]:
        sizes[left["reason"]] += left["bytes"]
    for reason, size in sizes.items():
        yield f"the daemon leaves mappings of {format_size(size)} alone: {reason}"
    if target.get("needs_move"):
        yield f"the daemon left sizes alone: {target['needs_move']}"
