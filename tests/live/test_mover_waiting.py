"""Threads that wait in a system call do not notice that they were stopped."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mover_targets import (
    BLOCK,
    BLOCK_SIZE,
    GEOMETRY,
    ORDER,
    PREAMBLE,
    SYSCALL_TIMEOUT,
    SYSCALLS,
    WAITERS,
    Syscalls,
    Waiters,
)
from mthp.errors import TargetVanishedError
from mthp.linux.mover import x86_64
from mthp.linux.mover.session import MoverSession
from mthp.linux.mover.steps import Step
from mthp.linux.process import Process
from targets import threads_of
from thp_switches import ThpSwitches
from waiting import until, wait_for

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "mthp", "mover")]

ROUNDS = 20
TURNS = int(os.environ.get("MTHP_TEST_TURNS", "40"))


def _move_all(target: Waiters, rounds: int) -> None:
    blocks = [(address, ORDER) for address in range(target.base, target.base + target.size, BLOCK)]
    with Process(target.pid) as process, MoverSession(process, GEOMETRY, duty=1.0, max_pause_ns=10**7) as session:
        for _ in range(rounds):
            assert {outcome.errno for outcome in session.move(blocks)} <= {0, errno.EAGAIN, errno.EBUSY}


def test_waiting_threads_notice_nothing(tmp_path: Path, thp_switches: ThpSwitches) -> None:
    thp_switches.only(BLOCK_SIZE, word="always")
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
    thp_switches.only(BLOCK_SIZE, word="always")
    monkeypatch.setattr(x86_64, "EINTR_CALLS", frozenset())
    with Waiters(tmp_path) as target:
        _move_all(target, 1)
        wait_for(lambda: leaking <= target.interrupted())
        assert leaking <= target.interrupted()


def test_calls_return_what_they_return_undisturbed(tmp_path: Path, thp_switches: ThpSwitches) -> None:
    """Twelve system calls, which time out or get what they wait for, turn by turn: value, errno and all else.

    A timeout that is given as a length starts again at every stop, so there are rests in which it can come to its end.
    """
    thp_switches.only(BLOCK_SIZE, word="always")
    with Syscalls(tmp_path, TURNS) as alone:
        expected = alone.returned()
    assert set(expected) == set(SYSCALLS)
    assert not any(untimely for turns in expected.values() for *_, untimely in turns)
    stops = 0
    with Syscalls(tmp_path, TURNS) as target:
        blocks = [(address, ORDER) for address in range(target.base, target.base + target.size, BLOCK)]
        with (
            Process(target.pid) as process,
            contextlib.suppress(TargetVanishedError),
            MoverSession(process, GEOMETRY, duty=0.5, max_pause_ns=10**7, stop_timeout_ns=60 * 10**9) as session,
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


CALLER = """
memory = mmap.mmap(-1, 4 * BLOCK, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = bytes([7]) * len(memory)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
signal.signal(signal.SIGUSR1, lambda *_: None)
signal.siginterrupt(signal.SIGUSR1, CALL != "restarted read")
buffer, event = ctypes.create_string_buffer(1), ctypes.create_string_buffer(16)
long = ctypes.create_string_buffer(struct.pack("qq", 600, 0))
epoll = select.epoll()
epoll.register(0, select.EPOLLIN)
calls = {
    "pause": lambda: libc.pause(),
    "read": lambda: libc.read(0, buffer, 1),
    "restarted read": lambda: libc.read(0, buffer, 1),
    "nanosleep": lambda: libc.nanosleep(long, None),
    "epoll_wait": lambda: libc.epoll_wait(epoll.fileno(), event, 1, -1),
}
print(-(-address // BLOCK) * BLOCK, flush=True)
while True:
    result = calls[CALL]()
    print(result, ctypes.get_errno(), flush=True)
"""


@pytest.mark.parametrize("step", [Step.HIJACKED, Step.PARKED, Step.FETCHED])
@pytest.mark.parametrize("call", ["pause", "read", "restarted read", "nanosleep", "epoll_wait"])
def test_a_signal_that_comes_while_its_thread_stands_still_interrupts_its_call(
    thp_switches: ThpSwitches, call: str, step: Step
) -> None:
    """Whoever waits for a signal that has come, and been handled, would wait for ever otherwise.

    The thread is the one that runs our code, as there is no other.
    """
    thp_switches.only(BLOCK_SIZE, word="always")
    interrupted = f"-1 {errno.EINTR}\n"
    sent = turn = 0

    def send(done: Step) -> None:
        nonlocal sent
        if done is step and sent < turn:
            os.kill(target.pid, signal.SIGUSR1)
            sent += 1

    code = f"import select, signal\n{PREAMBLE}\nBLOCK, CALL = {BLOCK}, {call!r}\n{CALLER}"
    with subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as target:
        assert target.stdin is not None
        assert target.stdout is not None
        try:
            address = int(target.stdout.readline())
            for turn in range(1, 5):
                until(lambda: threads_of(target.pid) == {target.pid: "S"}, "it to wait")
                with Process(target.pid) as process, MoverSession(process, GEOMETRY, observer=send) as session:
                    if step is not Step.HIJACKED:
                        session.move([(address, ORDER)])
                assert sent == turn
                if call != "restarted read":
                    assert wait_for(lambda: select.select([target.stdout], [], [], 0)[0]), "it waits on"
                    assert target.stdout.readline() == interrupted
            if call == "restarted read":
                target.stdin.write("x")
                target.stdin.flush()
                assert target.stdout.readline() == "1 0\n"
        finally:
            target.kill()
