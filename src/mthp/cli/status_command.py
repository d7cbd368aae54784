"""``mthp status``: what the running daemon does and has done. ``mthp pause`` and ``mthp resume`` are beside it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from mthp.cli.options import json_option
from mthp.cli.output import console, milliseconds, print_json, say
from mthp.cli.render.tables import Table
from mthp.errors import MthpError
from mthp.units import format_size, percent

PAUSE_SECONDS = 10.0
"""For so long `mthp pause` waits for the piece of work at hand."""

run_dir_option = click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory of the daemon's socket and lock; /run/mthp by default.",
)


def ask_daemon(command: str, run_dir: Path | None) -> dict[str, Any]:
    """Ask the daemon whose socket is in `run_dir`."""
    from mthp.daemon.control import NAME, ask
    from mthp.linux.journal.files import default_root

    return ask((run_dir or default_root()) / NAME, command)


@click.command("status")
@run_dir_option
@json_option
def command(run_dir: Path | None, as_json: bool) -> int:
    """Say what the running daemon does: its targets, what was collapsed in each, what failed and why."""
    status = ask_daemon("status", run_dir)
    if as_json:
        print_json("status", status)
    else:
        with of_this_version():
            print_status(console(), status)
    return 0


@contextmanager
def of_this_version() -> Iterator[None]:
    """Refuse an answer in which something is missing: a daemon of another version, or something else, made it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        if isinstance(error, MthpError):
            raise
        raise MthpError(
            f"the daemon's answer makes no sense: {str(error)[:60]}",
            help="it may be of another version than this mthp: restart it",
        ) from error


@of_this_version()
def set_paused(word: str, run_dir: Path | None, as_json: bool) -> int:
    """Tell the daemon to pause or to resume; a pause is there when this returns."""
    answer = ask_daemon(word, run_dir)
    deadline = time.monotonic() + PAUSE_SECONDS
    while answer["paused"] and answer["busy"] and time.monotonic() < deadline:
        time.sleep(0.02)
        status = ask_daemon("status", run_dir)
        answer = {"paused": status["paused"], "busy": status["busy"]}
    if as_json:
        print_json(word, answer)
    else:
        busy = ", but it is still at work on one process" if answer["paused"] and answer["busy"] else ""
        click.echo(f"{'paused' if answer['paused'] else 'going on'}{busy}")
    return 1 if answer["paused"] and answer["busy"] else 0


def print_status(out: Console, status: dict[str, Any]) -> None:
    """Print the daemon's answer as tables."""
    counters = status["counters"]
    state = "paused" if status["paused"] else "resting: memory pressure" if status["resting"] else "working"
    say(
        out,
        f"process {status['pid']}, {state}, up {status['uptime_seconds']:.0f} s; CPU {status['cpu_seconds']:.2f} s"
        f" ({percent(status['cpu_seconds'] / max(status['uptime_seconds'], 1e-9))} of a core,"
        f" limit {percent(status['cpu'])}), memory {format_size(status['resident_memory_bytes'])}",
    )
    say(out, f"finds processes by {status['finds_processes_by']}")
    folios = " ".join(f"{size}:{count}" for size, count in reversed(counters["collapses"].items())) or "none"
    say(
        out,
        f"folios made {folios}; {format_size(counters['collapsed_bytes'])} in all,"
        f" copied {format_size(counters['copied_bytes'])}, bloat {format_size(counters['bloat_bytes'])}",
    )
    for what, key in (("pauses", "pauses"), ("calls of the kernel", "calls")):
        times = counters[key]
        if times["count"]:
            spread = ", ".join(f"{name} {milliseconds(times[f'{name}_seconds'])}" for name in ("p50", "p99", "max"))
            say(out, f"{what}: {times['count']}; {spread}")
    failed = ", ".join(f"{name} {count}" for name, count in counters["collapse_failures"].items())
    if failed:
        say(out, f"failed: {failed}")
    if status["orders_refused"]:
        say(out, f"not asked for at the moment, since the machine had none: {', '.join(status['orders_refused'])}")
    rows = [_row(target) for target in sorted(status["targets"], key=lambda target: -target["collapsed_bytes"])]
    columns = ["pid", "name", "rule", "policy", "collapsed", "bloat", "longest pause", "state"]
    out.print(Table(f"{len(rows)} targets", columns, rows, right={0, 4, 5, 6}, names={1, 2}))
    if reach := sum(target.get("out_of_reach_bytes", 0) for target in status["targets"]):
        say(
            out, f"out of reach: {format_size(reach)} lie in no whole PMD range of their mapping: mthp collapse --small"
        )
    for reason, count in status["left_out"].items():
        say(out, f"left out {count}: {reason}")


def _row(target: dict[str, Any]) -> list[str]:
    state = "at work" if target["working"] else f"next look in {target['next_look_seconds']:.1f} s"
    if target["left_out"]:
        state = f"left out: {target['left_out']}"
    elif target["reasons"]:
        state += f"; not collapsed: {next(iter(target['reasons']))}"
    elif target["remade"]["remade_ranges"]:
        state += f"; khugepaged will make {target['remade']['remade_ranges']} PMD ranges huge again"
    elif target.get("needs_move"):
        state += f"; not collapsed: {target['needs_move']}"
    elif not target["collapsed_bytes"] and target["left_alone"]:
        left = target["left_alone"][0]
        state += f"; left alone: {left['reason']} ({format_size(left['bytes'])})"
    if (level := target.get("eagerness_level")) is not None:
        state = f"eagerness {level:.1f}; {state}"
    return [
        str(target["pid"]),
        target["comm"],
        target["rule"],
        target["policy"],
        format_size(target["collapsed_bytes"]),
        format_size(target["bloat_bytes"]),
        milliseconds(max(target["pauses"]["max_seconds"], target["calls"]["max_seconds"])),
        state,
    ]
