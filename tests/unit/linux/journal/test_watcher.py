"""The watcher of the journal: it puts everything back whatever ends its owner, and then ends.

On a directory that stands for sysfs, with the tunables of khugepaged, which the mechanism ``khugepaged`` sets.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from journal_owners import (
    BEFORE,
    INNER,
    OUTER,
    Tunables,
    ended,
    forked,
    in_a_window,
    opened,
    watchers_of,
    windows,
)
from mthp.errors import MthpError, UnsupportedError
from mthp.linux.journal import watcher
from mthp.linux.journal.store import JOURNAL_NAME, LOCK_NAME, JournalFiles, has_entries, owner_of
from mthp.linux.journal.watcher import IDLE_TICKS, STOPPED_TICKS, Watcher
from waiting import until

KILLS = int(os.environ.get("MTHP_TEST_KILLS", "30"))
"""How many owners are killed, at random moments and at steps each."""


@pytest.fixture
def tunables(tmp_path: Path) -> Tunables:
    return Tunables(tmp_path)


def settled(tunables: Tunables, values: dict[str, str] = BEFORE) -> None:
    until(lambda: tunables.settled(values), lambda: f"{values}: {tunables.values()}, {tunables.watchers()}")


def ready_watcher(tunables: Tunables) -> int:
    """Wait until there is one watcher, its parent has ended, and it has the journal open; return its PID."""
    until(lambda: [_comm(each) for each in tunables.watchers()] == [watcher.NAME], "one watcher")
    (found,) = tunables.watchers()
    until(lambda: JOURNAL_NAME in " ".join(_descriptors(found)), "its files")
    return found


def test_one_watcher_for_all_journals_of_a_process(tunables: Tunables) -> None:
    def work() -> None:
        for _ in range(3):
            with tunables.journal().settings(OUTER):
                pass
        with tunables.journal().settings(OUTER):
            signal.pause()

    pid = forked(work)
    until(lambda: tunables.values()["max_ptes_none"] == "0", "a window")
    ready_watcher(tunables)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    settled(tunables)


def test_an_owner_that_ends_well_leaves_no_watcher(tunables: Tunables) -> None:
    def work() -> None:
        with tunables.journal().settings(OUTER):
            pass
        os._exit(0)

    assert ended(forked(work)) == 0
    settled(tunables)


@pytest.mark.parametrize(
    "numbers",
    [
        pytest.param((signal.SIGKILL,), marks=pytest.mark.slow),
        pytest.param((signal.SIGHUP,), marks=pytest.mark.slow),
        (signal.SIGSTOP, signal.SIGKILL),
    ],
)
def test_killed_at_random_moments(tunables: Tunables, numbers: tuple[signal.Signals, ...]) -> None:
    slowest = 0.0
    for _ in range(KILLS):
        pid = forked(lambda: windows(tunables))
        until(lambda: has_entries(tunables.root), "a window")
        time.sleep(random.random() / 20)
        for number in numbers:
            os.killpg(pid, number)
        assert ended(pid) == -numbers[-1]
        begin = time.perf_counter()
        settled(tunables)
        slowest = max(slowest, time.perf_counter() - begin)
    print(f"{KILLS} times {numbers}: everything was put back after {slowest:.3f} s at most")


def test_what_another_has_set_meanwhile_stays(tunables: Tunables) -> None:
    pid = forked(lambda: in_a_window(tunables))
    opened(tunables)
    tunables.set("max_ptes_none", "17")
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    settled(tunables, BEFORE | {"max_ptes_none": "17"})


def test_while_the_owner_is_stopped_nothing_is_changed(tunables: Tunables) -> None:
    pid = forked(lambda: in_a_window(tunables, then=lambda: time.sleep(0.01)))
    opened(tunables)
    os.kill(pid, signal.SIGSTOP)
    until(lambda: tunables.values() == BEFORE, "the watcher to see a stopped owner")
    # Set by an administrator, to what happens to be our word: it was put back before, and is not any more.
    tunables.set("max_ptes_none", "0")
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    settled(tunables, BEFORE | {"max_ptes_none": "0"})


def test_an_owner_that_was_stopped_goes_on(tunables: Tunables) -> None:
    def work() -> None:
        journal = tunables.journal()
        with journal.settings(OUTER):
            (tunables.thp / "open").touch()
            until((tunables.thp / "go").exists, "to go on")
        with journal.settings(INNER):
            os._exit(0 if tunables.values() == BEFORE | {"scan_sleep_millisecs": "10"} else 1)

    pid = forked(work)
    until((tunables.thp / "open").exists, "a window")
    os.kill(pid, signal.SIGSTOP)
    until(lambda: tunables.values() == BEFORE, "the watcher to see a stopped owner")
    (tunables.thp / "go").touch()
    os.kill(pid, signal.SIGCONT)
    assert ended(pid) == 0
    settled(tunables)


def test_another_that_is_stopped_does_not_disturb_a_window(tunables: Tunables) -> None:
    """The stopped process has a watcher and no window; the window of this process is not its business."""

    def work() -> None:
        with tunables.journal().settings(INNER):
            pass
        (tunables.thp / "done").touch()
        signal.pause()

    pid = forked(work)
    until((tunables.thp / "done").exists, "a window")
    ready_watcher(tunables)
    os.kill(pid, signal.SIGSTOP)
    try:
        with tunables.journal(watched=False).settings(OUTER):
            time.sleep((STOPPED_TICKS + 2) * watcher.TICK_SECONDS)
            assert tunables.values()["max_ptes_none"] == "0"
    finally:
        os.kill(pid, signal.SIGKILL)
        ended(pid)
    settled(tunables)


def test_a_killed_watcher_is_replaced(tunables: Tunables) -> None:
    def work() -> None:
        journal = tunables.journal()
        for _ in range(3):
            with journal.settings(OUTER):
                os.kill(ready_watcher(tunables), signal.SIGKILL)
                until(lambda: not tunables.watchers(), "its end")
        in_a_window(tunables)

    pid = forked(work)
    opened(tunables)
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    settled(tunables)


def test_a_journal_that_was_removed_has_a_new_watcher(tunables: Tunables) -> None:
    def work() -> None:
        journal = tunables.journal()
        with journal.settings(INNER):
            ready_watcher(tunables)
        shutil.rmtree(tunables.root)
        in_a_window(tunables)

    pid = forked(work)
    until(lambda: tunables.values()["max_ptes_none"] == "0", "a window in the new directory")
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    settled(tunables)


def test_without_owner_and_watcher_the_next_window_puts_back(tunables: Tunables) -> None:
    pid = forked(lambda: in_a_window(tunables))
    opened(tunables)
    for each in (ready_watcher(tunables), pid):
        os.kill(each, signal.SIGKILL)
    ended(pid)
    assert tunables.values() != BEFORE
    with tunables.journal(watched=False).settings(INNER):
        assert tunables.values() == BEFORE | {"scan_sleep_millisecs": "10"}
    settled(tunables)


def test_a_child_that_has_inherited_the_lock(tunables: Tunables) -> None:
    """One forked by Python closes it; one by other means holds it. The next window then has to wait for that one."""

    def work() -> None:
        with tunables.journal().settings(OUTER):
            lock = next(path for path in Path("/proc/self/fd").iterdir() if LOCK_NAME in str(path.readlink()))
            os.set_inheritable(int(lock.name), True)
            child = forked(signal.pause)
            os.posix_spawn("/bin/sleep", ["sleep", "600"], {})
            (tunables.thp / "child").write_text(str(child))
            signal.pause()

    pid = forked(work)
    told = tunables.thp / "child"
    until(lambda: told.exists() and told.read_text(), "a window")
    sleeper = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[-1])
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    until(lambda: tunables.values() == BEFORE and not tunables.watchers(), "everything to be put back")
    for each in (sleeper, int(told.read_text())):
        os.kill(each, signal.SIGKILL)
    with tunables.journal(watched=False).settings(OUTER):
        pass
    settled(tunables)


def test_an_owner_that_is_replaced_by_another_program(tunables: Tunables) -> None:
    pid = forked(lambda: in_a_window(tunables, lambda: os.execv("/bin/sleep", ["sleep", "600"])))
    until(lambda: tunables.values() == BEFORE and not has_entries(tunables.root), "everything to be put back")
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    settled(tunables)


def test_an_idle_watcher_ends_and_says_so(tunables: Tunables) -> None:
    files = JournalFiles(tunables.root, create=True)
    reader, writer = os.pipe()
    idle = Watcher(files, tunables.thp, os.getpid(), owner_of(os.getpid()), writer)
    other = JournalFiles(tunables.root, create=False)
    assert other.try_lock()
    assert not any(idle._tick() for _ in range(IDLE_TICKS + 1)), "it ended while a window may be open"
    other.close()
    assert idle._tick()
    assert os.read(reader, 1) == b""
    files.close()
    os.close(reader)


def test_a_window_needs_a_watcher(tunables: Tunables, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("sys.executable", "/bin/program-that-embeds-python")
    monkeypatch.setattr("sys.base_exec_prefix", "/nowhere")
    with pytest.raises(UnsupportedError, match="Python interpreter"), tunables.journal().settings(OUTER):
        pytest.fail("the window opened")
    monkeypatch.undo()
    monkeypatch.setattr("sys.executable", "/dev/null/python3")
    monkeypatch.setattr(os, "access", lambda *_path, **_options: True)
    with pytest.raises(MthpError, match="cannot be started: Not a directory"), tunables.journal().settings(OUTER):
        pytest.fail("the window opened")
    monkeypatch.undo()
    exits = tmp_path / "python-that-exits"
    exits.write_text("#!/bin/sh\nexit 1\n")
    exits.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(exits))
    journal = tunables.journal()
    with journal.settings(OUTER):
        pass
    until(lambda: not tunables.watchers(), "its end")
    with pytest.raises(MthpError, match="exits at its start"), journal.settings(OUTER):
        pytest.fail("the window opened")
    assert tunables.values() == BEFORE
    assert not has_entries(tunables.root)


def test_nothing_of_the_owner_is_kept(tunables: Tunables) -> None:
    def work() -> None:
        for fd in (0, 1, 2):
            os.close(fd)
        os.set_inheritable(os.open("/dev/zero", os.O_RDONLY), True)
        in_a_window(tunables)

    pid = forked(work)
    opened(tunables)
    found = ready_watcher(tunables)
    assert not [each for each in _descriptors(found) if "zero" in each]
    assert os.getsid(found) != os.getsid(pid)
    assert Path(f"/proc/{found}/cwd").readlink() == Path("/")
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    settled(tunables)


def test_watchers_of_other_journals_are_not_taken_for_ours(tunables: Tunables) -> None:
    assert watchers_of(tunables.root / "elsewhere") == []


def _comm(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""


def _descriptors(pid: int) -> list[str]:
    return [str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()]
