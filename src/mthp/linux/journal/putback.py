"""Read and write switches, and undo the changes of a journal."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from mthp.errors import MthpError
from mthp.linux.journal.instance import INSTANCE, kdamonds_of, read_instance, write_instance, write_setting
from mthp.linux.journal.store import Change, JournalFiles, boot_id
from mthp.linux.kernelfiles import text_of

_CHOSEN = re.compile(r"\[(\w+)\]")


@dataclass(frozen=True, slots=True)
class Restored:
    """The result of undoing one change of a run that crashed.

    Attributes:
        switch: as in :class:`~mthp.linux.journal.store.Change`.
        found: the word before undoing, or ``""`` if the switch is gone.
        was: the word from before that run's change.
        put_back: whether it was put back; if not, another program has changed it since, and it keeps that word.
    """

    switch: str
    found: str
    was: str
    put_back: bool

    def __str__(self) -> str:
        if self.put_back:
            return f"put back: {self.switch} from {self.found} to {self.was}"
        now = f"is {self.found} now" if self.found else "is gone"
        return f"left alone: {self.switch} was {self.was}, and {now}: it was changed since"


def path_of(sysfs: Path, switch: str) -> Path:
    """Return the file that is written to change `switch`."""
    return kdamonds_of(sysfs) / "nr_kdamonds" if switch == INSTANCE else sysfs / switch


def read_word(sysfs: Path, switch: str) -> str | None:
    """Return the chosen word or number; None if there is no such switch.

    Args:
        switch: path below `sysfs`, or :data:`~mthp.linux.journal.instance.INSTANCE`.
    """
    if switch == INSTANCE:
        return read_instance(kdamonds_of(sysfs))
    text = text_of(sysfs / switch) or ""
    # A switch shows all its words, with the chosen one in brackets; a tunable only its number.
    chosen = _CHOSEN.search(text)
    return chosen[1] if chosen else text if text.isdecimal() else None


def write_word(sysfs: Path, switch: str, word: str) -> None:
    """Write `word` to a switch.

    Raises:
        NotPermittedError: these rights are not sufficient.
        MthpError: the kernel refuses it.
    """
    if switch == INSTANCE:
        write_instance(kdamonds_of(sysfs), word)
        return
    write_setting(path_of(sysfs, switch), word)


Write = Callable[[str, str], None]
"""Writes a word (second) to a switch (first)."""


def put_back(sysfs: Path, changes: Sequence[Change], write: Write | None = None) -> list[Restored]:
    """Undo `changes`, last first, where the switch still has mthp's word; return the results.

    Args:
        changes: changes of one journal, in its order.
        write: function to call instead of :func:`write_word`.

    Raises:
        NotPermittedError, MthpError: one could not be undone; all others were.
    """
    boot = boot_id()
    restored = []
    failed: MthpError | None = None
    # Last first, because windows nest: an inner one found the word of the outer one.
    for change in reversed(changes):
        found = read_word(sysfs, change.switch)
        # After a reboot the switches are new. A switch that has the old word was never reached, or was put back before.
        if change.boot != boot or found == change.was:
            continue
        # Any other word was written by another program meanwhile, and stays.
        if found == change.ours:
            try:
                write(change.switch, change.was) if write else write_word(sysfs, change.switch, change.was)
            except MthpError as error:
                # The others are put back nevertheless; this one stays in the journal.
                failed = error
        restored.append(Restored(change.switch, found or "", change.was, found == change.ours))
    if failed is not None:
        raise failed
    return restored


def settle(
    files: JournalFiles, sysfs: Path, *, but: Collection[Change] = (), write: Write | None = None
) -> list[Restored]:
    """Put back the changes in the journal; keep only entries that a running process keeps.

    The caller holds the lock, so the writers of all other entries are dead.

    Args:
        but: entries that were put back before; if a switch has the same word now, it was set since.
        write: as for :func:`put_back`.

    Raises:
        NotPermittedError, MthpError: as :func:`put_back`; the journal is unchanged.
    """
    changes = files.read()
    # A daemon that runs keeps them for its whole life, and without the lock.
    held = [change for change in changes if change.holds]
    restored = put_back(sysfs, [change for change in changes if change not in but and change not in held], write)
    files.write(held)
    return restored
