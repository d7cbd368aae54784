"""Threads that wait in a system call do not notice that they were stopped."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import time
from pathlib import Path

import pytest

from mover_targets import SYSCALL_TIMEOUT, SYSCALLS, WAITERS, Syscalls, Waiters
from mthp.errors import TargetVanishedError
from mthp.geometry import X86_64
from mthp.linux.mover import x86_64
from mthp.linux.mover.session import MoverSession
from mthp.linux.process import Process
from thp_switches import ThpSwitches
from waiting import wait_for

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "mthp", "4k-pages")]

ROUNDS = 20
TURNS = int(os.environ.get("MTHP_TEST_TURNS", "40"))


def _move_all(target: Waiters, rounds: int) -> None:
    blocks = [(address, 4) for address in range(target.base, target.base + target.size, 65536)]
    with Process(target.pid) as process, MoverSession(process, X86_64, duty=1.0, max_pause_ns=10**7) as session:
        for _ in range(rounds):
            assert {outcome.errno for outcome in session.move(blocks)} <= {0, errno.EAGAIN, errno.EBUSY}


def test_waiting_threads_notice_nothing(tmp_path: Path, thp_switches: ThpSwitches) -> None:
    thp_switches.only("64kB", word="always")
    with Waiters(tmp_path) as target:
        assert target.not_waiting() == {}
        _move_all(target, ROUNDS)
        returned = target.not_waiting()
        assert set(returned) <= {"nanosleep"}, "a system call returned, though nothing happened that it waits for"
        assert target.release() == dict.fromkeys(WAITERS, 2)


def test_without_the_repair_some_would_return_eintr(
    tmp_path: Path, thp_switches: ThpSwitches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The list of calls to repair is needed: this is what a plain stop does to them."""
    leaking = {"epoll_wait", "epoll_pwait", "sigtimedwait", "semop", "io_getevents", "recv with timeout"}
    thp_switches.only("64kB", word="always")
    monkeypatch.setattr(x86_64, "EINTR_CALLS", frozenset())
    with Waiters(tmp_path) as target:
        _move_all(target, 1)
        wait_for(lambda: leaking <= target.interrupted())
        assert leaking <= target.interrupted()


def test_calls_return_what_they_return_undisturbed(tmp_path: Path, thp_switches: ThpSwitches) -> None:
    """Twelve system calls, which time out or get what they wait for, turn by turn: value, errno and all else.

    A timeout that is given as a length starts again at every stop, so there are rests in which it can come to its end.
    """
    thp_switches.only("64kB", word="always")
    with Syscalls(tmp_path, TURNS) as alone:
        expected = alone.returned()
    assert set(expected) == set(SYSCALLS)
    assert not any(untimely for turns in expected.values() for *_, untimely in turns)
    stops = 0
    with Syscalls(tmp_path, TURNS) as target:
        blocks = [(address, 4) for address in range(target.base, target.base + target.size, 65536)]
        with (
            Process(target.pid) as process,
            contextlib.suppress(TargetVanishedError),
            MoverSession(process, X86_64, duty=0.5, max_pause_ns=10**7, stop_timeout_ns=60 * 10**9) as session,
        ):
            while not target.finished:
                session.move(blocks[:4])
                stops += 1
                time.sleep(random.uniform(0, 2.5 * SYSCALL_TIMEOUT))
        returned = target.returned()
    assert stops > 5
    for name in SYSCALLS:
        assert returned[name] == expected[name], name
    print(f"{stops} stops during {TURNS} turns of {len(SYSCALLS)} calls")
