"""A tunable that is held while a process runs: together with windows, and put back however its owner ends."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from journal_owners import BEFORE, INNER, OUTER, Tunables, dying_at, ended, forked
from mthp.daemon.kernel_settings import TUNABLE
from mthp.errors import MthpError
from mthp.linux.journal.store import has_entries
from waiting import until

KILLS = int(os.environ.get("MTHP_TEST_KILLS", "30"))


KEPT = {TUNABLE: "7"}


@pytest.fixture
def tunables(tmp_path: Path) -> Tunables:
    return Tunables(tmp_path)


def number(tunables: Tunables) -> str:
    return tunables.values()["max_ptes_none"]


def kept(tunables: Tunables, *, watched: bool = True) -> None:
    tunables.journal(watched=watched).keep(KEPT)
    signal.pause()


def test_it_is_set_beside_windows_and_put_back(tunables: Tunables) -> None:
    journal, other = tunables.journal(watched=False), tunables.journal(watched=False)
    journal.keep(KEPT)
    assert number(tunables) == "7"
    for each in (journal, other):
        with each.settings(OUTER), each.settings(INNER):
            assert number(tunables) == "0"
        assert number(tunables) == "7"
    assert other.restore_after_crash() == []
    assert number(tunables) == "7"
    assert [each.was for each in journal.release()] == ["511"]
    assert tunables.values() == BEFORE
    assert not has_entries(tunables.root)
    assert journal.release() == []


def test_what_another_has_set_meanwhile_stays(tunables: Tunables) -> None:
    journal = tunables.journal(watched=False)
    journal.keep(KEPT)
    tunables.set("max_ptes_none", "99")
    assert [each.put_back for each in journal.release()] == [False]
    assert number(tunables) == "99"


def test_two_processes_do_not_keep_the_same(tunables: Tunables) -> None:
    pid = forked(lambda: kept(tunables, watched=False))
    until(lambda: number(tunables) == "7", "the child")
    with pytest.raises(MthpError, match="kept by another process"):
        tunables.journal(watched=False).keep({TUNABLE: "3"})
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    # Its owner ended, so the next one first puts back its changes.
    journal = tunables.journal(watched=False)
    journal.keep({TUNABLE: "3"})
    journal.release()
    assert tunables.values() == BEFORE


def test_what_a_process_kept_that_died_in_the_window_of_another_is_put_back_behind_it(tunables: Tunables) -> None:
    # Without a watcher, as after it has given up waiting for a long window.
    pid = forked(lambda: kept(tunables, watched=False))
    until(lambda: number(tunables) == "7", "the child")
    journal = tunables.journal(watched=False)
    with journal.settings(OUTER):
        outer = tunables.values()
        with journal.settings(INNER):
            os.kill(pid, signal.SIGKILL)
            ended(pid)
        assert tunables.values() == outer
    assert tunables.values() == BEFORE
    assert not has_entries(tunables.root)


def keeping(tunables: Tunables, then: Callable[[], object] = signal.pause) -> None:
    journal = tunables.journal()
    journal.keep(KEPT)
    with journal.settings(OUTER), journal.settings(INNER):
        then()
    then()


@pytest.mark.parametrize("numbers", [(signal.SIGKILL,), (signal.SIGSTOP, signal.SIGKILL)])
def test_the_watcher_puts_it_back_after_a_window_that_was_open(
    tunables: Tunables, numbers: tuple[signal.Signals, ...]
) -> None:
    pid = forked(lambda: keeping(tunables))
    until(lambda: tunables.values()["scan_sleep_millisecs"] == "10", "a window")
    for each in numbers:
        os.killpg(pid, each)
    ended(pid)
    until(tunables.settled, lambda: str(tunables.values()))


def test_a_stopped_owner_keeps_it_and_a_window_of_another_leaves_it(tunables: Tunables) -> None:
    pid = forked(lambda: kept(tunables))
    until(lambda: number(tunables) == "7", "the child")
    with tunables.journal(watched=False).settings(OUTER):
        assert number(tunables) == "0", "the child has released the lock"
    os.kill(pid, signal.SIGSTOP)
    with tunables.journal(watched=False).settings(OUTER):
        assert number(tunables) == "0"
    assert number(tunables) == "7"
    os.kill(pid, signal.SIGKILL)
    ended(pid)
    until(tunables.settled, lambda: str(tunables.values()))


def test_killed_at_every_step(tunables: Tunables) -> None:
    def work(event: int) -> None:
        with dying_at(event, lambda total: (tunables.thp / "steps").write_text(str(total))):
            journal = tunables.journal()
            journal.keep(KEPT)
            with journal.settings(OUTER), journal.settings(INNER):
                pass
            journal.release()
        os._exit(0)

    assert ended(forked(lambda: work(0))) == 0
    steps = int((tunables.thp / "steps").read_text())
    until(tunables.settled, lambda: str(tunables.values()))
    for event in sorted(random.sample(range(1, steps), min(KILLS, steps - 1))):
        assert ended(forked(lambda event=event: work(event))) in (-signal.SIGKILL, 0)  # type: ignore[misc]
        until(tunables.settled, lambda: str(tunables.values()))
