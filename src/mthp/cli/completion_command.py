"""``mthp completion SHELL``: print or install the script by which a shell completes mthp's command line."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from mthp.cli import COMPLETE_VARIABLE
from mthp.errors import MthpError
from mthp.files import write_whole

FILES = {
    "bash": "bash-completion/completions/mthp",
    "zsh": "zsh/site-functions/_mthp",
    "fish": "fish/vendor_completions.d/mthp.fish",
}
"""Path of each shell's script below the data directory: /usr/local/share, or a user's.

bash reads it with the package bash-completion, fish because of XDG_DATA_HOME. The `fpath` of zsh has only the first.
"""


@click.command("completion")
@click.argument("shell", type=click.Choice(list(FILES)))
@click.option(
    "--install", is_flag=True, help="Put it where the shell finds it: as root for all users, else for this one."
)
def command(shell: str, install: bool) -> None:
    """Print the script by which SHELL completes commands, options, targets, policies and files of mthp.

    With --install every new shell loads it.
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
    # The script of an older version may be there.
    write_whole(path, text.encode(), overwrite=True)
    click.echo(f"installed {path}")
    # For root the script is in the `fpath` of every zsh.
    if shell == "zsh" and os.geteuid():
        click.echo(f"next: put this line into ~/.zshrc, before compinit: fpath=({path.parent} $fpath)")


def script(shell: str) -> str:
    """Return the text of the script."""
    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    return kind(root, {}, "mthp", COMPLETE_VARIABLE).source().rstrip("\n") + "\n"


def destination(shell: str) -> Path:
    """Return the path of the script: for all users if this is root, else for this user."""
    if os.geteuid() == 0:
        return Path("/usr/local/share") / FILES[shell]
    data = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return data / FILES[shell]
