"""Completion of targets and policies in the shell. Options, commands and files are click's own."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias, TypeVar

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

from mthp.naming import KINDS, ProcessFacts
from mthp.text import clean

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
"""Pattern for names of processes that are one word in every shell. A process chooses its name, and other characters
could run commands.
"""

_PLAIN_PATTERN = re.compile(r"[A-Za-z0-9_./@:+-]+")
"""Pattern for what is proposed behind a kind: as `_PLAIN_NAME`, and the other characters of units, pods and paths."""

LONGEST_SECONDS = 0.5
"""Longest time for which processes are read: the shell waits, and a machine may have many thousands."""

_T = TypeVar("_T")

# In quotes, because the class is not generic before click 8.3.
Item: TypeAlias = "CompletionItem[str]"


def complete_target(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[Item]:
    """Return the targets that begin with `incomplete`, and have the shell look for files."""
    kind, colon, begun = incomplete.partition(":")
    if colon and kind in KINDS:
        return _names(kind, begun)
    # The shell completes files too only if this item comes first.
    found = [CompletionItem(incomplete, type="file")]
    found += [CompletionItem(word, help=_WORDS[word]) for word in _WORDS if word.startswith(incomplete)]
    found += complete_pid(context, parameter, incomplete)
    if incomplete:
        # Names that are a number or one of these words would be read as a PID or as the word.
        names = {name for _, name in _processes() if _PLAIN_NAME.fullmatch(name) and not name.isdecimal()} - set(_WORDS)
        found += [CompletionItem(each, help=_NAMED) for each in sorted(names) if each.startswith(incomplete)]
    kinds = [kind for kind in KINDS if kind.startswith(incomplete)]
    # The shell puts a space behind a single proposal, so a single kind is proposed with its names.
    found += _names(kinds[0], "") if len(kinds) == 1 else [CompletionItem(f"{kind}:") for kind in kinds]
    return found


def _names(kind: str, begun: str) -> list[Item]:
    """Return the targets of a kind with names that begin with `begun`, each with its number of processes."""
    from mthp.linux.facts import FactsReader

    reader, properties = FactsReader(), ["uid" if kind == "user" else kind]
    counts: Counter[str] = Counter()
    # /proc, or the links of containers, may not be readable.
    with suppress(OSError):
        for pid in _in_time(reader.pids()):
            if (facts := reader.read(pid, properties)) is not None:
                counts.update(set(_names_of(kind, facts)))
    users = _users() if kind == "user" else {}
    found = {users.get(name, name): count for name, count in counts.items()}
    return [
        CompletionItem(f"{kind}:{name}", help=f"{found[name]} process{'es' if found[name] > 1 else ''}")
        for name in sorted(found)
        if name.startswith(begun) and _PLAIN_PATTERN.fullmatch(name)
    ]


def _names_of(kind: str, facts: ProcessFacts) -> Iterable[str]:
    """Return the names of a kind that mean this process."""
    match kind:
        case "user":
            return (str(facts.uid),)
        case "unit":
            return facts.units
        case "container":
            return filter(None, (facts.container[:12], facts.container_name))
        case "cgroup":
            parts = facts.cgroup.split("/")
            # Those above it fit the process too.
            return ["/".join(parts[:end]) for end in range(2, len(parts) + 1)]
        case _:
            return filter(None, (getattr(facts, kind),))


def _users() -> dict[str, str]:
    """Return the names of users by number. Only of local ones, because a directory service may not answer in time."""
    users: dict[str, str] = {}
    with suppress(OSError):
        for line in Path("/etc/passwd").read_text(errors="replace").splitlines():
            fields = line.split(":")
            # The first name of a number is the one that the system uses.
            users.setdefault(fields[2] if len(fields) > 2 else "", fields[0])
    return users


def _in_time(items: Iterable[_T]) -> Iterator[_T]:
    """Yield `items` until the time is over."""
    ends = time.monotonic() + LONGEST_SECONDS
    for item in items:
        if time.monotonic() >= ends:
            return
        yield item


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
    for directory in _in_time(Path("/proc").iterdir()):
        # A process may exit at any moment.
        with suppress(OSError, ValueError):
            pid = int(directory.name)
            if not (directory / "statm").read_text().startswith("0 "):
                yield pid, (directory / "comm").read_text(errors="replace").rstrip("\n")


_BREAKS = re.compile("[:@=]+")
"""Characters at which bash ends a word (COMP_WORDBREAKS), and of which targets may consist."""


class BashTargets(BashComplete):
    """Completion in bash of targets with a colon, which bash takes for three words or more."""

    _typed = 0

    def get_completion_args(self) -> tuple[list[str], str]:
        """Return the words before the incomplete one, and that, with the words of a target put together."""
        args, incomplete = super().get_completion_args()
        words: list[str] = []
        for word in (*args, incomplete):
            last = words[-1] if words else ""
            joins = _BREAKS.fullmatch(word) or _BREAKS.fullmatch(last[-1:])
            # An empty word is a target that is not begun.
            if joins and word and last.partition(":")[0] in KINDS:
                words[-1] += word
            else:
                words.append(word)
        self._typed = 0
        if words[-1] != incomplete:
            # bash replaces only what is behind the last colon.
            self._typed = len(words[-1]) - len(_BREAKS.sub("", incomplete))
        return words[:-1], words[-1]

    def get_completions(self, args: list[str], incomplete: str) -> list[Item]:
        """Return the completions of the part that bash replaces."""
        found = super().get_completions(args, incomplete)
        return [CompletionItem(each.value[self._typed :], each.type, each.help) for each in found]


def register() -> None:
    """Have click use :class:`BashTargets`."""
    add_completion_class(BashTargets)
