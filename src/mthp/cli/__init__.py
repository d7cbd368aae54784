"""The command line: one module per command; parses, calls the library, prints.

Errors go to standard error. With ``--json`` they are also the one object on standard output: its schema is the
command's, and ``error`` holds ``message``, ``help`` and ``exit_code``.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence

import click

from mthp import __version__
from mthp.cli.signals import exit_code_if_ended, exit_code_of, raising_on_signals
from mthp.errors import MthpError, NotPermittedError, UnsupportedError
from mthp.text import clean

COMMANDS = {
    "doctor": "Show which abilities work here, and how to get the rest.",
    "inspect": "Count pages by folio order, per mapping and in all.",
    "plan": "Predict a collapse: folios, bytes copied, bytes of bloat.",
    "collapse": "Collapse a running process, now.",
    "trim": "Give back memory that large folios waste: pages of zeroes.",
    "explain": "Explain why memory is not in large folios.",
    "verify": "Check that memory lies in folios as expected; for monitoring.",
    "daemon": "Collapse chosen processes in the background.",
    "status": "Show the running daemon's targets, and its work so far.",
    "pause": "Pause the running daemon.",
    "resume": "Resume the paused daemon.",
    "snapshot": "Record the page layout of a process in a file.",
    "record": "Record a process over time, or convert a trace of accesses.",
    "compare": "Compare policies by coverage, bloat and creep.",
    "sweep": "Apply many settings to many inputs; write one table.",
    "simulate": "Run programs and khugepaged on a simulated machine.",
    "top": "Show processes by the gain of a collapse, kept up to date.",
    "report": "Write one HTML page: address space, policies and their price.",
    "conformance": "Replay golden cases of real kernels in the simulated machine.",
    "schema": "Print the JSON Schema of a command's output with --json.",
    "completion": "Print or install the completion script of a shell.",
    "demo": "Show mTHPs beside huge pages on processes of its own.",
}
"""The commands, in the order in which a new user needs them; each is the module ``mthp.cli.<name>_command``."""

COMPLETE_VARIABLE = "_MTHP_COMPLETE"
"""The environment variable by which the script of a shell requests completions, as click derives it from the program's
name.
"""


class _Commands(click.Group):
    """Imports a command's module on demand."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        # Only now, so that `mthp --help` imports no command.
        command = importlib.import_module(f"mthp.cli.{cmd_name}_command").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        # click would import every command for its help.
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.command(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done; 1 some of it could not be done; 2 wrong usage; 3 not permitted or not supported here;"
    " 4 the target vanished; 128 and N: signal N ended it.",
)
@click.version_option(__version__, prog_name="mthp")
def _mthp() -> None:
    """khugepaged with multi-size transparent huge pages, in user space.

    A TARGET is a PID, the word self, a snapshot file, all, or a name: comm:redis-server, exe:/usr/bin/qemu-*,
    unit:redis.service, cgroup:/kubepods.slice/*, pod:shop/redis-*, container:3f2a, user:redis. A bare word is the name
    of a process. Sizes are written 64K, 2M, or order=4; durations 500us, 90s or 2min; shares 20% or 0.2.
    """
    # These two put switches back themselves: doctor reports it, and the daemon retries later.
    if click.get_current_context().invoked_subcommand not in ("doctor", "daemon"):
        _put_back_leftovers()


def _put_back_leftovers() -> None:
    """Put back the switches that mthp left changed when it was killed with its watcher, as by cgroup.kill."""
    from mthp.linux.journal.store import all_roots, has_entries

    with contextlib.suppress(UnsupportedError):
        left = [root for root in all_roots() if has_entries(root)]
        if not left:
            return
        from mthp.linux.journal.switches import SwitchJournal

        for root in left:
            try:
                restored = SwitchJournal(root, lock_timeout=0).restore_after_crash()
            except NotPermittedError as error:
                _say(f"a killed mthp has left switches changed: {error.message}", "run `mthp doctor --restore` as root")
            except MthpError:
                # Another mthp is in a window, and the entries are its own.
                continue
            else:
                for switch in restored:
                    _say(f"a killed mthp had changed this switch; {switch}", "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line, and return its exit code (docs/exit-codes.md).

    Args:
        arguments: arguments after the program's name; by default the process's own.
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    if sys.stdout is None:
        # The parent process closed standard output: print to nowhere.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Characters that the locale lacks become question marks, because a traceback would replace the result.
        sys.stdout.reconfigure(errors="replace")
    try:
        return _run_until_signal(given)
    except OSError as error:
        # The output cannot be written: its reader has closed the pipe, the disk is full, or the terminal is closed.
        # Redirect it, because Python would try to write the rest of the buffer at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        # A closed pipe needs no words: the reader, such as head(1), had enough.
        if not isinstance(error, BrokenPipeError):
            with contextlib.suppress(OSError):
                # Only an error of the output itself has no file name.
                _say(str(error) if error.filename else f"the output cannot be written: {error.strerror}", "")
        return exit_code_if_ended() or 1


def _run_until_signal(arguments: list[str]) -> int:
    try:
        with raising_on_signals():
            code = _run(arguments)
            # A full disk shows here at the latest, where main() still reports it.
            sys.stdout.flush()
            return code
    except (KeyboardInterrupt, click.Abort) as error:
        # Caught here, because a signal may come before the first line of _run(), and Python would die of SIGINT.
        _say("interrupted", "")
        return _failed(arguments, "interrupted", "", exit_code_of(error))


def _run(arguments: list[str]) -> int:
    if COMPLETE_VARIABLE in os.environ:
        from mthp.cli.completing import register

        register()
    try:
        # Without it click prints errors and exits itself. Commands that always succeed return None.
        code = _mthp.main(args=arguments, prog_name="mthp", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except MthpError as error:
        _say(error.message, error.help)
        return _failed(arguments, error.message, error.help, error.exit_code)
    except click.ClickException as error:
        error.show()
        return _failed(arguments, error.format_message(), "", error.exit_code)


def _say(message: str, help: str) -> None:
    click.echo(f"mthp: {clean(message)}", err=True)
    for line in help.splitlines():
        click.echo(f"  {clean(line)}", err=True)


def _failed(arguments: list[str], message: str, help: str, code: int) -> int:
    """Print an error as JSON if `arguments` have --json, and return its exit code."""
    # As typed, because click may have refused the arguments before it parsed this one.
    if "--json" in arguments:
        command = next((word for word in arguments if word in COMMANDS), None)
        error = {"message": message, "help": help, "exit_code": code}
        click.echo(json.dumps({"schema": f"mthp.{command}/1" if command else "mthp/1", "error": error}, indent=2))
    return code
