"""``mthp completion SHELL``: the script by which a shell completes mthp's command line, printed or installed."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from mthp.errors import MthpError
from mthp.files import write_whole

VARIABLE = "_MTHP_COMPLETE"
"""The environment variable by which the script asks mthp, as click derives it from the program's name."""

FILES = {
    "bash": "bash-completion/completions/mthp",
    "zsh": "zsh/site-functions/_mthp",
    "fish": "fish/vendor_completions.d/mthp.fish",
}
"""Where each shell looks for the script below the directories of data: /usr/local/share, and those of a user.

bash looks there if it has the package bash-completion, and fish because of XDG_DATA_HOME. zsh has the first alone in
its `fpath`.
"""


@click.command("completion")
@click.argument("shell", type=click.Choice(list(FILES)))
@click.option(
    "--install", is_flag=True, help="Put it where the shell finds it: as root for all users, else for this one."
)
def command(shell: str, install: bool) -> None:
    """Print the script by which SHELL completes commands, options, targets, policies and files of mthp.

    With --install a new shell has it.
    """
    text = script(shell)
    if not install:
        click.echo(text, nl=False)
        return
    path = destination(shell)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MthpError(f"{path.parent} cannot be created: {error.strerror}") from error
    write_whole(path, text.encode(), overwrite=True)
    click.echo(f"installed {path}")
    if shell == "zsh" and os.geteuid():
        click.echo(f"next: put this line into ~/.zshrc, before compinit: fpath=({path.parent} $fpath)")


def script(shell: str) -> str:
    """Return the text of the script."""
    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    return kind(root, {}, "mthp", VARIABLE).source().rstrip("\n") + "\n"


def destination(shell: str) -> Path:
    """Return the path of the script for all users if this is root, else for this user."""
    if os.geteuid() == 0:
        return Path("/usr/local/share") / FILES[shell]
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return data / FILES[shell]
