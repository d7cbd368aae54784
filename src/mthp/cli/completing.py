"""Completion of targets and policies in the shell. Options, commands and files are click's own."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import click
from click.shell_completion import CompletionItem

from mthp.text import clean

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
"""Pattern for names of processes that are one word in every shell. A process chooses its name, and other characters
could run commands.
"""

# In quotes, because the class is not generic before click 8.3.
Item: TypeAlias = "CompletionItem[str]"


def complete_target(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Item]:
    """Return the PIDs and names of processes that begin with `incomplete`, and have the shell look for files."""
    # The shell completes files too only if this item comes first.
    found = [CompletionItem(incomplete, type="file")]
    found += [CompletionItem(word, help=_WORDS[word]) for word in _WORDS if word.startswith(incomplete)]
    found += complete_pid(context, parameter, incomplete)
    # Names that are a number or one of these words would be read as a PID or as the word.
    names = {name for _, name in _processes() if _PLAIN_NAME.fullmatch(name) and not name.isdecimal()} - set(_WORDS)
    if incomplete:
        found += [CompletionItem(each, help=_NAMED) for each in sorted(names) if each.startswith(incomplete)]
    return found


def complete_pid(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Item]:
    """Return the PIDs that begin with `incomplete`."""
    return [
        CompletionItem(str(pid), help=clean(name))
        for pid, name in sorted(_processes())
        if str(pid).startswith(incomplete)
    ]


def complete_policy(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Item]:
    """Return the policies with names that begin with `incomplete`."""
    # Imported here, because the shell waits for every completion.
    from mthp.engine.policy_lookup import policy_names

    return [CompletionItem(name) for name in policy_names() if name.startswith(incomplete)]


def complete_policies(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Item]:
    """Return lists of policies, separated by commas, that begin with `incomplete`."""
    before, comma, last = incomplete.rpartition(",")
    return [CompletionItem(f"{before}{comma}{item.value}") for item in complete_policy(context, parameter, last)]


_WORDS = {"self": "this process", "all": "all processes"}
"""Targets that are words."""

_NAMED = "processes of this name"


def _processes() -> Iterator[tuple[int, str]]:
    """Yield PID and name of every process with memory of its own; kernel threads have none."""
    for directory in Path("/proc").iterdir():
        # A process may exit at any moment.
        with suppress(OSError, ValueError):
            pid = int(directory.name)
            if not (directory / "statm").read_text().startswith("0 "):
                yield pid, (directory / "comm").read_text(errors="replace").rstrip("\n")
