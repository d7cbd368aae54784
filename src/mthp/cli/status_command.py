"""``mthp status``: the running daemon's state and work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from mthp.cli.asking import ask_daemon, of_this_version, run_dir_option
from mthp.cli.options import json_option
from mthp.cli.render.output import console, milliseconds, print_json, say
from mthp.cli.render.tables import Table
from mthp.text import numbered
from mthp.units import format_size, percent


@click.command("status")
@run_dir_option
@json_option
def command(run_dir: Path | None, as_json: bool) -> int:
    """Show the running daemon's targets, their collapsed memory, failures and reasons."""
    status = ask_daemon("status", run_dir)
    if as_json:
        print_json("status", status)
    else:
        with of_this_version():
            print_status(console(), status)
    return 0


def print_status(out: Console, status: dict[str, Any]) -> None:
    """Print the daemon's answer as tables."""
    counters = status["counters"]
    state = "paused" if status["paused"] else "resting: memory pressure" if status["resting"] else "working"
    say(
        out,
        f"process {status['pid']}, {state}, up {status['uptime_seconds']:.0f} s; CPU {status['cpu_seconds']:.2f} s"
        # A daemon that has just started is up for 0 seconds.
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
        say(
            out,
            "not tried at the moment, because the machine had no free folio of these sizes:"
            f" {', '.join(status['orders_refused'])}",
        )
    rows = [_row(target) for target in sorted(status["targets"], key=lambda target: -target["collapsed_bytes"])]
    columns = ["pid", "name", "rule", "policy", "collapsed", "bloat", "longest pause", "state"]
    out.print(Table(numbered(len(rows), "target"), columns, rows, right={0, 4, 5, 6}, names={1, 2}))
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
