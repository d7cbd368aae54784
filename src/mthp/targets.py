"""Targets, as a user may name them, and the address spaces behind them."""

from __future__ import annotations

import difflib
import glob
import numbers
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mthp.addrspace import AddressSpace
from mthp.errors import MthpError, TargetVanishedError, UsageError
from mthp.naming import ALL, HOW_TO_NAME, Match, ProcessFacts, match_of

if TYPE_CHECKING:
    from mthp.linux.facts import FactsReader

Target = int | str | os.PathLike[str]
"""A PID, ``"self"``, the path of a snapshot or recording, or a name (:mod:`mthp.naming`) that fits one process.

A PID may be written as text. Any other word is the name of a process, as after ``comm:``.
"""

PID_MAX = 1 << 22
"""No process has a larger PID (PID_MAX_LIMIT, include/linux/threads.h)."""

SHOWN = 5
"""The most processes and names that an error lists."""


_NAMES: dict[str, Callable[[ProcessFacts], Iterable[str]]] = {
    "comm": lambda facts: (facts.comm,),
    "exe": lambda facts: (facts.exe,),
    "unit": lambda facts: (name for unit in facts.units for name in (unit, unit.removesuffix(".service"))),
    "cgroup": lambda facts: (facts.cgroup,),
    "pod": lambda facts: (facts.pod, facts.pod.rpartition("/")[2]),
}
"""The names of a process by kind, for hints."""


@dataclass(frozen=True, slots=True)
class Found:
    """One target.

    Attributes:
        target: a PID, or the path of a snapshot or recording.
        label: name to print: ``"1234 (comm)"``, or the path.
        facts: the known facts of a process that was found by a name; None for a PID or a file.
    """

    target: Target
    label: str
    facts: ProcessFacts | None = None

    @property
    def service(self) -> str:
        """The name of the pod, container or service of a process; ``""`` for a file, or if its own is all it has."""
        service = self.facts.service if self.facts else ""
        return "" if service.startswith("comm:") else service

    def open(self, *, at: str | None = None) -> AddressSpace:
        """Open its address space, as :func:`open_target`.

        Raises:
            TargetVanishedError: the process is gone, and another may have its PID.
        """
        space = open_target(self.target, at=at)
        process = getattr(space, "process", None)
        if self.facts is not None and process is not None and process.starttime != self.facts.starttime:
            space.close()
            raise TargetVanishedError(f"process {self.label} is gone", help="it exited")
        return space


@dataclass(frozen=True, slots=True)
class Targets:
    """The targets that some words name.

    Attributes:
        found: the targets, each once, in the order of the words, and of the PIDs for each word.
        missing: words that fit no process, each with the reason.
        single: whether the words are one PID or file, so that there is one target whatever processes run.
    """

    found: tuple[Found, ...]
    missing: tuple[tuple[str, MthpError], ...] = ()
    single: bool = False


def find(*names: Target) -> list[Found]:
    """Return the processes and files that `names` name.

    Args:
        names: PIDs, ``"self"``, paths of snapshots and recordings, and names such as ``"unit:redis.service"``,
            ``"pod:shop/*"``, ``"comm:java"`` or ``"all"`` (:mod:`mthp.naming`). A name never finds this process, kernel
            threads and zombies.

    Raises:
        UsageError: a word is none of these.
        TargetVanishedError: a name fits no process.
    """
    targets = find_targets(names)
    if targets.missing:
        raise targets.missing[0][1]
    return list(targets.found)


def find_targets(words: Sequence[Target]) -> Targets:
    """Return the targets of `words`; words that fit nothing are in `missing` of the result.

    Raises:
        UsageError: a word is neither a PID nor a file nor a name.
        TargetVanishedError: no word fits anything.
    """
    if not words:
        raise UsageError("no target was named", help=HOW_TO_NAME)
    finder = _Finder()
    found: dict[Target, Found] = {}
    missing = []
    for word in words:
        try:
            for each in finder.find(word):
                found.setdefault(each.target, each)
        except TargetVanishedError as error:
            missing.append((str(word), error))
    single = len(words) == 1 and not finder.searched
    if missing and not found:
        raise missing[0][1]
    return Targets(tuple(found.values()), tuple(missing), single)


class _Finder:
    """A search for the targets of words.

    Attributes:
        searched: whether a word was a name, so that processes were searched.
    """

    def __init__(self) -> None:
        self.searched = False
        self._reader: FactsReader | None = None

    def find(self, word: Target) -> Iterator[Found]:
        if (pid := pid_of(word)) is not None:
            yield Found(pid, str(pid))
            return
        if not isinstance(word, (str, os.PathLike)):
            raise UsageError(
                f"a target is not of type {type(word).__name__}",
                help=f"{HOW_TO_NAME}; collapse_buffer() takes an array",
            )
        match = match_of(word) if isinstance(word, str) else None
        if match is None and os.path.lexists(word):
            yield Found(word, str(word))
            return
        yield from self._named(str(word), match)

    def _named(self, word: str, match: Match | None) -> Iterator[Found]:
        self.searched = True
        reader = self._facts()
        bare = match is None
        if match is None and "/" not in word and word and not word.startswith("-"):
            match = match_of(f"comm:{word}")
        fitting = list(self._fitting(match)) if match is not None else []
        if not fitting and bare:
            raise self._unknown(word)
        if not fitting:
            hidden = reader.hidden(match.named if match else ())
            raise TargetVanishedError(f"no process fits {word!r}", help=hidden or self._close(word))
        yield from (Found(each.pid, each.label, each) for each in fitting)

    def _facts(self) -> FactsReader:
        if self._reader is None:
            # Imported here, because a file is found without it.
            from mthp.linux.facts import FactsReader

            self._reader = FactsReader()
        return self._reader

    def _fitting(self, match: Match) -> Iterator[ProcessFacts]:
        """Yield the processes that fit, with all facts that are known of them."""
        reader, own = self._facts(), os.getpid()
        for pid in reader.pids():
            facts = reader.read(pid, match.named)
            # This process reads while it is measured, so it never means itself by a name.
            if facts is None or pid == own or not match.fits(facts):
                continue
            known = reader.read(pid, ALL)
            # The PID may belong to another process by now.
            if known is not None and known.starttime == facts.starttime:
                yield known

    def _unknown(self, word: str) -> MthpError:
        kind, colon, _ = word.partition(":")
        close = self._close(word)
        if colon and kind.isalpha():
            close = f"unknown kind of name {kind!r}; "
        return UsageError(
            f"target {word!r} is neither a PID nor 'self' nor a file that exists, nor the name of a process",
            help=f"{close}{HOW_TO_NAME}; a file is the output of `mthp snapshot` or `record`",
        )

    def _close(self, word: str) -> str:
        """Return the question whether `word` was meant as a similar name; ``""`` if none is similar."""
        kind, _, given = word.rpartition(":")
        for each in dict.fromkeys((kind, "comm")):
            names = sorted(self._names(each)) if each in _NAMES else []
            if close := difflib.get_close_matches(given[:64], names, n=1):
                return f"did you mean {each}:{glob.escape(close[0])}? "
        return ""

    def _names(self, kind: str) -> set[str]:
        """Return the names of one kind that processes have now."""
        reader = self._facts()
        every = (facts for pid in reader.pids() if (facts := reader.read(pid, (kind,))) is not None)
        return {name for facts in every for name in _NAMES[kind](facts) if name}


def resolve(target: Target) -> Target:
    """Return the PID of the one process that a name fits; return other targets unchanged.

    Raises:
        UsageError: `target` is not a target, or several processes fit.
        TargetVanishedError: no process fits.
    """
    found = find(target)
    if len(found) > 1:
        listed = ", ".join(each.label for each in found[:SHOWN])
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        raise UsageError(
            f"{len(found)} processes fit {str(target)!r}: {listed}{more}", help="name one of them by its PID"
        )
    return found[0].target


def open_target(target: Target, *, at: str | None = None) -> AddressSpace:
    """Open the address space that `target` names. The caller closes it (it is a context manager).

    Args:
        at: a step of a recording, as for :meth:`mthp.snapshot.recording.Recording.step_at`; by default the last.

    Raises:
        UsageError: `target` is not a target, a name that fits several processes, or a file that is neither snapshot
            nor recording; or the step does not exist.
        TargetVanishedError: the process does not exist.
        NotPermittedError: the rights do not suffice to read its memory.
        UnsupportedError: it has no memory to read; or the reader of snapshots is not installed.
    """
    target = resolve(target)
    if (pid := pid_of(target)) is not None:
        # Imported here, because both backends are large, and a command needs one of them.
        from mthp.linux.live import open_live

        if at is not None:
            raise UsageError(f"a process has no step {at!r}", help="steps are those of a recording: mthp record")
        return open_live("self" if pid == os.getpid() else pid)
    from mthp.snapshot import open_file

    assert not isinstance(target, int)  # pid_of() returned None.
    return open_file(target, at=at)


def pid_of(target: Target) -> int | None:
    """Return the PID that `target` is; None if it is not a PID.

    Raises:
        TargetVanishedError: no process can have this number.
    """
    if isinstance(target, str) and target == "self":
        return os.getpid()
    if isinstance(target, str):
        if not re.fullmatch(r"-?[0-9]+", target):
            return None
        # Python does not convert numbers of thousands of digits. The first 20 are as invalid as all of them.
        target = int(target[:20])
    # NumPy's integers are not ints, and True is not a PID.
    if isinstance(target, bool) or not isinstance(target, numbers.Integral):
        return None
    target = int(target)
    if not 0 < target <= PID_MAX:
        raise TargetVanishedError(f"no process {target}: PIDs are 1 to {PID_MAX}")
    return target


def refuse_ancestor(target: Target) -> None:
    """Refuse a process that this one depends on: its shell, its terminal, its service manager.

    Raises:
        UsageError: `target` is an ancestor of this process.
    """
    from mthp.linux.process import ancestors

    # Up to the first process, because any of them may hold the terminal that this one writes to.
    pid = pid_of(target)
    if pid is not None and pid in ancestors():
        raise UsageError(
            f"process {pid} is an ancestor of this mthp (its shell, terminal or service manager)",
            help="start mthp from elsewhere, for example from another terminal, to collapse this process",
        )
