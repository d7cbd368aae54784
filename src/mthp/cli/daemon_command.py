"""``mthp daemon``: khugepaged in user space, for the processes that rules or options name."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import click

from mthp import __version__
from mthp.cli.asking import run_dir_option
from mthp.cli.completing import complete_pid, complete_policy, complete_target
from mthp.cli.options import RATE, SHARE
from mthp.errors import UsageError
from mthp.geometry import Geometry
from mthp.means import Mechanism
from mthp.naming import match_of
from mthp.text import clean, numbered


@click.command("daemon")
@click.argument("targets", nargs=-1, metavar="[TARGET]...", shell_complete=complete_target)
@click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Rules (TOML): a file, or a directory with mthp.toml and conf.d/*.toml; /etc/mthp by default. SIGHUP makes the"
    " daemon read them again.",
)
@click.option(
    "--pid",
    type=int,
    multiple=True,
    metavar="PID",
    shell_complete=complete_pid,
    help="Work on this process. May be repeated.",
)
@click.option("--cgroup", multiple=True, metavar="GLOB", help="Work on these cgroups (v2 path), and those below them.")
@click.option("--comm", multiple=True, metavar="GLOB", help="Work on processes of this name.")
@click.option("--exe", multiple=True, metavar="GLOB", help="Work on processes of this executable.")
@click.option("--uid", multiple=True, metavar="USER", help="Work on processes of this user.")
@click.option("--all", "every_process", is_flag=True, help="Work on all processes.")
@click.option(
    "--policy", metavar="NAME", shell_complete=complete_policy, help="Policy that chooses orders; mainline by default."
)
@click.option("--orders", metavar="SIZES", help="16K,64K,2M; all; or enabled (the default): what the switches allow.")
@click.option("--max-ptes-none", type=int, metavar="N", help="Empty pages a collapse may fill, per PMD range.")
@click.option("--max-ptes-swap", type=int, metavar="N", help="Swapped pages it may read back, per PMD range.")
@click.option("--max-ptes-shared", type=int, metavar="N", help="Shared pages it may copy, per PMD range.")
@click.option("--mechanism", type=click.Choice(get_args(Mechanism)), help="As in mthp collapse; auto by default.")
@click.option(
    "--max-pause", metavar="TIME", help="The longest time for which threads may be stopped at once; 5ms by default."
)
@click.option("--pause-share", metavar="%", help="The part of the time for which they may be stopped; 20% by default.")
@click.option(
    "--max-bloat", metavar="SIZE|%|none", help="Bytes, or share of the resident memory, that filling may add."
)
@click.option("--reserve", metavar="SIZE|%", help="As in mthp collapse.")
@click.option("--max-threads", type=click.IntRange(1), metavar="N", help="As in mthp collapse.")
@click.option("--eagerness", type=int, metavar="0..10", help="One number: how much is filled, and how fast.")
@click.option("--min-split-share", metavar="%", help="As in mthp collapse.")
@click.option("--rate", metavar="SIZE", help="Bytes collapsed per second in one process at most.")
@click.option("--cpu", type=SHARE, help="CPU time, as a share of one core; 10% by default.")
@click.option("--bytes-per-second", type=RATE, help="Bytes collapsed per second in all processes at most.")
@click.option(
    "--keep-max-ptes-none",
    type=int,
    metavar="N",
    help="Keep the system's max_ptes_none at N while the daemon runs: with more, the kernel's khugepaged makes huge"
    " folios of small ones.",
)
@click.option("--metrics", metavar="[HOST:]PORT", help="Serve Prometheus metrics there; on the loopback by default.")
@click.option("--events", type=click.Path(path_type=Path), metavar="FILE", help="Append events as JSON lines.")
@run_dir_option
@click.option("--check-config", is_flag=True, help="Read the rules, print their errors, and end.")
@click.option("--print-config", is_flag=True, help="Print an example of a rules file that shows every key, and end.")
@click.option("--print-unit", is_flag=True, help="Print a systemd unit that runs it with these options, and end.")
@click.option("--install-unit", is_flag=True, help="Install that unit, and end.")
def command(run_dir: Path | None, **options: Any) -> int:
    """Collapse the memory of chosen processes to large folios, in the background, by their rules.

    Rules choose them, of --config or of /etc/mthp/mthp.toml and /etc/mthp/conf.d/*.toml; or without rules a PID, all,
    comm:NAME, exe:PATH, unit:NAME, cgroup:/PATH, pod:NAMESPACE/NAME, container:ID or user:NAME; * stands for any text.
    Switches and tunables are always the current ones of /sys/kernel/mm/transparent_hugepage, unless the rules set
    others.

    It runs in the foreground until SIGTERM or Ctrl-C. `mthp status`, `mthp pause` and `mthp resume` control it.
    """
    if options["print_config"]:
        from mthp.daemon.config import example

        click.echo(example(), nl=False)
        return 0
    load = _loader(options)
    if options["print_unit"] or options["install_unit"]:
        # Its errors are reported now, and not when the service starts.
        configuration = load()
        return _unit(configuration.events, configuration.metrics, install=options["install_unit"])
    if options["check_config"]:
        configuration = load()
        click.echo(f"{numbered(len(configuration.rules.rules), 'rule')}, no errors")
        return 0
    from mthp.daemon.service import Daemon
    from mthp.linux.journal.store import default_root

    Daemon(load, run_dir or default_root(), __version__, _say).run()
    return 0


def _say(line: str) -> None:
    click.echo(f"mthp daemon: {clean(line)}", err=True)


def _loader(options: dict[str, Any]) -> Callable[[], Any]:
    """Return a function that reads the configuration, afresh at each call: the daemon calls it at SIGHUP, too."""
    from mthp.daemon import config
    from mthp.linux.sysfs import ThpSysfs

    geometry = ThpSysfs().geometry()
    if any(options[name] for name in (*_MATCHES, "every_process", "targets")) and options["config"] is None:
        return lambda: _with_daemon_options(_from_options(options, geometry), options, geometry)
    path: Path = (options["config"] or config.DIRECTORY).absolute()
    if options["config"] is None and not path.exists():
        raise UsageError(
            f"no rules: {path} does not exist",
            help=f"write {path / config.MAIN} (mthp daemon --print-config prints an example), or name processes:"
            " mthp daemon comm:NAME",
        )
    clash = [name for name in _OF_RULES if options[name] not in (None, (), False)]
    if clash:
        rules = "--config" if options["config"] else str(path)
        raise UsageError(
            f"{rules} and {_flag(clash[0])} are given", help="set it in the rules file: [defaults] or [[rule]]"
        )
    return lambda: _with_daemon_options(config.load_configuration(path, geometry), options, geometry)


_SETTINGS = (
    *("policy", "orders", "max_ptes_none", "max_ptes_swap", "max_ptes_shared", "mechanism", "max_pause", "pause_share"),
    *("max_bloat", "reserve", "max_threads", "eagerness", "min_split_share", "rate"),
)
"""Options that are settings, under their names in a rules file."""

_MATCHES = ("pid", "exe", "comm", "cgroup", "uid")
"""Options for the ``match`` of a rule, under its names."""

_OF_RULES = (*_MATCHES, "every_process", "targets", *_SETTINGS)
"""Options that a rules file replaces."""


def _flag(name: str) -> str:
    if name == "targets":
        return "a target"
    return "--all" if name == "every_process" else f"--{name.replace('_', '-')}"


def _from_options(options: dict[str, Any], geometry: Any) -> Any:
    """Return the configuration of the options alone, checked as a file with the same content is."""
    from mthp.daemon.config import configuration_of

    defaults = {name: options[name] for name in _SETTINGS if options[name] is not None}
    rules = [{"name": f"--{name}", "match": {name: list(options[name])}} for name in _MATCHES if options[name]]
    if options["every_process"]:
        rules.append({"name": "--all", "match": {}})
    # A target that is named twice is one rule.
    rules += [{"name": word, "match": _match(word)} for word in dict.fromkeys(options["targets"])]
    return configuration_of({"defaults": defaults, "rule": rules}, geometry, "options")


def _match(word: str) -> dict[str, Any]:
    """Return the ``match`` of a rules file that a target means; a bare word is a process's name."""
    if word.isascii() and word.isdecimal():
        # Python does not convert numbers of thousands of digits.
        return {"pid": [int(word[:20])]}
    match = match_of(word) or match_of(f"comm:{word}")
    return {name: list(getattr(match, name)) for name in match.named} if match else {}


def _with_daemon_options(configuration: Any, options: dict[str, Any], geometry: Geometry) -> Any:
    """Return `configuration` with the options for the daemon itself."""
    kept, most = options["keep_max_ptes_none"], geometry.ptes_per_pmd - 1
    if kept is not None and not 0 <= kept <= most:
        raise UsageError(f"--keep-max-ptes-none is out of range: {kept}", help=f"use 0 to {most}")
    from mthp.daemon.config import parse_endpoint

    names = ("cpu", "bytes_per_second", "keep_max_ptes_none", "events")
    changes = {name: options[name] for name in names if options[name] is not None}
    if options["metrics"] is not None:
        changes["metrics"] = parse_endpoint(options["metrics"])
    return dataclasses.replace(configuration, **changes)


def _unit(events: Path | None, metrics: tuple[str, int] | None, *, install: bool) -> int:
    """Print or install the unit that runs the daemon with the arguments of this call."""
    from mthp.daemon import systemd

    # A service starts in / (systemd.exec(5), WorkingDirectory=).
    arguments = _absolute([word for word in _own_arguments() if word not in ("--print-unit", "--install-unit")])
    text = systemd.unit_text(arguments, events and events.absolute(), metrics, systemd=systemd.systemd_release())
    if not install:
        click.echo(text, nl=False)
        return 0
    path = systemd.install(text)
    click.echo(f"installed {path}")
    click.echo("next: systemctl daemon-reload && systemctl enable --now mthp")
    return 0


def _own_arguments() -> list[str]:
    """Return the arguments after the word ``daemon``."""
    # As typed: the parsed options also hold every default.
    given: list[str] = click.get_current_context().find_root().meta.get("mthp.arguments", sys.argv[1:])
    return given[given.index("daemon") + 1 :]


def _absolute(arguments: list[str]) -> list[str]:
    """Return `arguments` with absolute paths."""
    made = []
    for word, before in zip(arguments, ["", *arguments], strict=False):
        option, equals, value = word.partition("=")
        if before in ("--config", "--events", "--run-dir"):
            word = str(Path(word).absolute())
        elif equals and option in ("--config", "--events", "--run-dir"):
            word = f"{option}={Path(value).absolute()}"
        made.append(word)
    return made
