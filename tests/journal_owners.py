"""Processes that open windows of a journal on a directory that stands for sysfs, and what watches them."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import mthp.linux.journal
from mthp.linux.journal.store import has_entries
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.sysfs import ThpSysfs
from waiting import until

BEFORE = {"pages_to_scan": "4096", "scan_sleep_millisecs": "10000", "max_ptes_none": "511"}
OUTER = {"khugepaged/pages_to_scan": "1000000000", "khugepaged/max_ptes_none": "0"}
INNER = {"khugepaged/scan_sleep_millisecs": "10"}

_JOURNAL = str(Path(mthp.linux.journal.__file__).parent)


class Tunables:
    """khugepaged's tunables in a directory, and a journal for them."""

    def __init__(self, directory: Path) -> None:
        self.thp, self.root = directory / "thp", directory / "run"
        (self.thp / "khugepaged").mkdir(parents=True)
        for name, value in BEFORE.items():
            self.set(name, value)

    def set(self, name: str, value: str) -> None:
        (self.thp / "khugepaged" / name).write_text(value + "\n")

    def values(self) -> dict[str, str]:
        return {name: (self.thp / "khugepaged" / name).read_text().strip() for name in BEFORE}

    def journal(self, *, watched: bool = True) -> SwitchJournal:
        return SwitchJournal(self.root, ThpSysfs(self.thp), watched=watched)

    def watchers(self) -> list[int]:
        return watchers_of(self.root)

    def settled(self, values: dict[str, str] = BEFORE) -> bool:
        """Return whether everything is put back, and no process is left.

        A regular file is empty between O_TRUNC and the write, as no switch ever is: that is put right here.
        """
        if has_entries(self.root) or self.watchers():
            return False
        for name in (name for name, value in self.values().items() if not value):
            self.set(name, values[name])
        return self.values() == values


def watchers_of(root: Path) -> list[int]:
    """Return the watchers of the journal in `root`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = path.read_bytes().split(b"\0")
            if os.fsencode(root) in words and b"-S" in words:
                found.append(int(path.parent.name))
    return found


def windows(tunables: Tunables) -> None:
    """Open windows, one in the other, until killed."""
    journal = tunables.journal()
    while True:
        with journal.settings(OUTER), journal.settings(INNER):
            pass


def in_a_window(tunables: Tunables, then: Callable[[], object] = signal.pause) -> None:
    """Open a window, and stay in it."""
    journal = tunables.journal()
    with journal.settings(OUTER), journal.settings(INNER):
        while True:
            then()


def forked(work: Callable[[], object]) -> int:
    """Run `work` in a child with a process group of its own, and return its PID."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            work()
        finally:
            os._exit(1)
    return pid


def ended(pid: int) -> int:
    """Wait for a child, and return how it ended: an exit code, or a signal's number with a minus sign."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def opened(tunables: Tunables) -> None:
    """Wait until the inner window is open."""
    until(lambda: tunables.values()["scan_sleep_millisecs"] == "10", "a window")


@contextlib.contextmanager
def dying_at(event: int, count: Callable[[int], object] = lambda _: None) -> Iterator[None]:
    """Have this process killed at a numbered call in the journal's code, or return from one.

    Args:
        event: the number, from 1.
        count: gets how many there were.
    """
    seen = 0

    def profile(frame: FrameType, _what: str, _argument: Any) -> None:
        nonlocal seen
        if frame.f_code.co_filename.startswith(_JOURNAL):
            seen += 1
            if seen == event:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)
    try:
        yield
    finally:
        sys.setprofile(None)
        count(seen)
