"""New, changed and ended processes: from the kernel's events, and from a /proc that the test makes."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from mthp.errors import NotPermittedError, UnsupportedError
from mthp.linux.facts import FactsReader
from mthp.linux.procevents import MAX_GAP, MOST_EVENTS, SWEEP_SECONDS, Changes, ProcConnector, ProcPolling, SharingEvent
from waiting import until


class FakeProc:
    """A /proc in which processes come and go."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.last(1)

    def last(self, pid: int) -> None:
        (self.root / "loadavg").write_text(f"0.00 0.01 0.05 1/123 {pid}\n")

    def add(self, pid: int, tgid: int | None = None) -> None:
        (self.root / str(pid)).mkdir()
        (self.root / str(pid) / "status").write_text(f"Name:\tx\nUmask:\t0022\nTgid:\t{tgid or pid}\nPid:\t{pid}\n")

    def remove(self, pid: int) -> None:
        (self.root / str(pid) / "status").unlink()
        (self.root / str(pid)).rmdir()


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path)


def test_looking_finds_what_was_born_and_no_threads(proc: FakeProc) -> None:
    proc.add(1)
    polling = ProcPolling(proc.root, Time())
    assert polling.changes() == Changes()
    proc.add(5)
    proc.add(6, tgid=5)
    proc.last(7)
    assert polling.changes() == Changes(born={5})
    assert polling.changes() == Changes()
    polling.close()


def test_numbers_that_begin_anew_and_large_gaps_are_found_by_listing(proc: FakeProc) -> None:
    proc.last(4_000_000)
    polling = ProcPolling(proc.root, Time())
    proc.add(300)
    proc.last(301)
    assert polling.changes() == Changes(born={300})
    proc.add(302)
    proc.last(302 + MAX_GAP)
    assert polling.changes() == Changes(born={302})
    polling.close()


def test_what_does_not_show_in_the_last_number_is_found_by_the_sweep(proc: FakeProc) -> None:
    clock = Time()
    proc.add(9)
    polling = ProcPolling(proc.root, clock)
    proc.add(4)
    proc.remove(9)
    assert polling.changes() == Changes()
    clock.now += SWEEP_SECONDS
    assert polling.changes() == Changes(born={4}, gone={9})
    polling.close()


FORK = 1
"""PROC_EVENT_FORK (include/uapi/linux/cn_proc.h)."""


def connector() -> ProcConnector:
    try:
        return ProcConnector()
    except (NotPermittedError, UnsupportedError) as error:
        pytest.skip(error.message)


@pytest.mark.requires("root")
def test_the_kernel_tells_of_processes_and_not_of_threads() -> None:
    events = connector()
    threads = [threading.Thread(target=lambda: None) for _ in range(3)]
    for thread in threads:
        thread.start()
        thread.join()
    child = subprocess.Popen(["sleep", "60"])
    seen = Changes()

    def look() -> Changes:
        found = events.changes()
        seen.born |= found.born
        seen.gone |= found.gone
        return found

    until(lambda: look().born >= {child.pid} or child.pid in seen.born, "its birth")
    assert not seen.born & {thread.native_id for thread in threads}
    assert os.getpid() not in seen.gone
    os.kill(child.pid, signal.SIGKILL)
    until(lambda: child.pid in (look().gone | seen.gone), "its end")
    child.wait()
    events.close()


@pytest.mark.requires("root")
def test_who_was_born_and_ended_in_between_is_not_told_of() -> None:
    events = connector()
    gone = subprocess.Popen(["true"])
    gone.wait()
    time.sleep(0.05)
    changes = events.changes()
    assert gone.pid not in changes.born | changes.changed | changes.gone
    events.close()


def test_a_storm_of_events_is_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count(1)
    monkeypatch.setattr(ProcConnector, "_next", lambda self: (FORK, (1, 1, 0, next(numbers), 0, 0)))
    events = ProcConnector.__new__(ProcConnector)
    assert events.changes().born == set(range(1, MOST_EVENTS + 1))
    assert min(events.changes().born) == MOST_EVENTS + 1, "the next call goes on behind it"


def test_facts_are_those_that_were_asked_for() -> None:
    facts = FactsReader().read(os.getpid(), frozenset({"uid", "exe", "cgroup"}))
    assert facts is not None
    assert facts.uid == os.getuid()
    assert facts.exe == str(Path("/proc/self/exe").readlink())
    assert facts.cgroup in Path("/proc/self/cgroup").read_text()
    less = FactsReader().read(os.getpid(), frozenset())
    assert less is not None
    assert (less.uid, less.exe, less.cgroup) == (-1, "", "")
    assert less.comm == Path("/proc/self/comm").read_text().rstrip("\n")
    assert FactsReader().read(1 << 23, frozenset()) is None


def test_forks_execs_and_exits_are_told_of_in_their_order() -> None:
    changes = connector()
    # A child that forks and ends, as programs do that become daemons.
    wait, done = os.pipe()
    child = os.fork()
    if child == 0:
        if os.fork() == 0:
            os.read(wait, 1)
            os.execvp("true", ["true"])
        os._exit(0)
    os.waitpid(child, 0)
    os.write(done, b".")
    seen: list[SharingEvent] = []

    def grandchild() -> list[SharingEvent]:
        seen.extend(changes.changes().sharing)
        born = [event.pid for event in seen if event.kind == "fork" and event.parent == child]
        return [event for event in seen if event.pid in born]

    until(lambda: [event.kind for event in grandchild()] == ["fork", "exec", "exit"], lambda: str(seen))
    assert SharingEvent("fork", child, os.getpid()) in seen
    assert SharingEvent("exit", child, os.getpid()) in seen
    changes.close()
    os.close(wait)
    os.close(done)
