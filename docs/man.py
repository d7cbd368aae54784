"""Write a man page for mthp and for each of its commands: ``python docs/man.py DIRECTORY``."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from click_man.core import write_man_pages

from mthp import __version__
from mthp.cli import COMMANDS, _mthp


def write(directory: Path) -> list[Path]:
    """Write the pages to a directory, and return them."""
    directory.mkdir(parents=True, exist_ok=True)
    with click.Context(_mthp) as context:
        # click_man reads the attribute `commands`, which a group that imports its commands late does not fill.
        _mthp.commands = {name: found for name in COMMANDS if (found := _mthp.get_command(context, name))}
    write_man_pages("mthp", _mthp, version=__version__, target_dir=str(directory))
    return sorted(directory.glob("*.1"))


if __name__ == "__main__":
    print(f"{len(write(Path(sys.argv[1])))} pages in {sys.argv[1]}")
