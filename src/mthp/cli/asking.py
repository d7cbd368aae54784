"""Requests to the running daemon: the place of its socket, and a check of its answer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from mthp.cli.render.output import print_json
from mthp.errors import MthpError

PAUSE_SECONDS = 10.0
"""Seconds that `mthp pause` waits for the current piece of work."""

run_dir_option = click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory of the daemon's socket and lock; /run/mthp by default.",
)


def ask_daemon(command: str, run_dir: Path | None) -> dict[str, Any]:
    """Return the answer of the daemon with its socket in `run_dir`."""
    from mthp.daemon.ipc import SOCKET_NAME, ask
    from mthp.linux.journal.store import default_root

    return ask((run_dir or default_root()) / SOCKET_NAME, command)


@contextmanager
def of_this_version() -> Iterator[None]:
    """Refuse an incomplete answer: it comes from another version's daemon, or from another program."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        # A UsageError is a ValueError, too, and says more by itself.
        if isinstance(error, MthpError):
            raise
        raise MthpError(
            f"the daemon's answer is not valid: {str(error)[:60]}",
            help="restart the daemon: its version may not be that of this mthp",
        ) from error


@of_this_version()
def set_paused(word: str, run_dir: Path | None, as_json: bool) -> int:
    """Have the daemon pause or resume, and return the exit code. Wait until a pause is in effect."""
    answer = ask_daemon(word, run_dir)
    deadline = time.monotonic() + PAUSE_SECONDS
    while answer["paused"] and answer["busy"] and time.monotonic() < deadline:
        time.sleep(0.02)
        status = ask_daemon("status", run_dir)
        # The keys of the first answer, because they are printed with --json.
        answer = {"paused": status["paused"], "busy": status["busy"]}
    if as_json:
        print_json(word, answer)
    else:
        busy = ", but it is still at work on one process" if answer["paused"] and answer["busy"] else ""
        click.echo(f"{'paused' if answer['paused'] else 'resumed'}{busy}")
    return 1 if answer["paused"] and answer["busy"] else 0
