"""Threads that wait in a system call do not notice that they were stopped."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from mover_targets import (
    BLOCK,
    GEOMETRY,
    ORDER,
    PREAMBLE,
    SYSCALL_TIMEOUT,
    SYSCALLS,
    WAITERS,
    Observe,
    Syscalls,
    Waiters,
    compiled,
)
from mthp.errors import TargetVanishedError
from mthp.linux.mover.arch import native, x86_64
from mthp.linux.mover.arch.architecture import Architecture, Registers
from mthp.linux.mover.session import MoverSession
from mthp.linux.mover.steps import Step
from mthp.linux.process import Process
from targets import threads_of
from waiting import until, wait_for

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "mthp", "mover")]

ROUNDS = 20
TURNS = int(os.environ.get("MTHP_TEST_TURNS", "40"))

QUEUED = 10 * TURNS
"""Signals."""

LEAKING = {"epoll_wait", "epoll_pwait", "sigtimedwait", "semop", "io_getevents", "recv with timeout"}
"""Calls that return EINTR after a plain stop."""

NOT_REPAIRED = LEAKING if os.uname().machine == "aarch64" else set()
"""Machines on which the kernel does not show that a stop interrupted the call."""


def _move_all(target: Waiters, rounds: int, machine: Architecture | None = None) -> None:
    blocks = [(address, ORDER) for address in range(target.base, target.base + target.size, BLOCK)]
    with (
        Process(target.pid) as process,
        MoverSession(process, GEOMETRY, duty=1.0, max_pause_ns=10**7, machine=machine) as session,
    ):
        for _ in range(rounds):
            assert {outcome.errno for outcome in session.move(blocks)} <= {0, errno.EAGAIN, errno.EBUSY}


@pytest.mark.slow
def test_waiting_threads_notice_nothing(tmp_path: Path, only_blocks: None) -> None:
    with Waiters(tmp_path) as target:
        assert target.not_waiting() == {}
        _move_all(target, ROUNDS)
        returned = target.not_waiting()
        assert target.interrupted() == NOT_REPAIRED
        nothing_happened = "a system call returned, though nothing happened that it waits for"
        assert set(returned) <= {"nanosleep"} | NOT_REPAIRED, nothing_happened
        expected = dict.fromkeys(WAITERS, 2) | dict.fromkeys(NOT_REPAIRED, -errno.EINTR)
        assert target.release() == expected


class Unrepaired(x86_64.X8664):
    """x86-64 without the repair of system calls that a stop ends with EINTR."""

    eintr_calls = frozenset()


@pytest.mark.slow
def test_without_the_repair_some_would_return_eintr(tmp_path: Path, only_blocks: None) -> None:
    """Check that the list of calls to repair is needed: a plain stop breaks each."""
    # aarch64 has no such list: there the kernel does not show which calls a stop interrupted.
    machine = Unrepaired() if native().name == Unrepaired.name else None
    with Waiters(tmp_path) as target:
        _move_all(target, 1, machine)
        wait_for(lambda: target.interrupted() >= LEAKING)
        assert target.interrupted() >= LEAKING


@pytest.mark.slow
def test_calls_return_what_they_return_undisturbed(tmp_path: Path, only_blocks: None) -> None:
    """Twelve system calls that in turn time out or succeed: value, errno and all other results.

    A timeout that is given as a length starts again at every stop, so there are rests in which it can come to its end.
    """
    turns, stops = TURNS, 0
    while stops <= 5:
        with Syscalls(tmp_path, turns) as alone:
            expected = alone.returned()
        assert set(expected) == set(SYSCALLS)
        assert not {name: found for name, found in expected.items() if any(untimely for *_, untimely in found)}
        stops, returned = _disturbed(tmp_path, turns)
        for name in set(SYSCALLS) - NOT_REPAIRED:
            assert returned[name] == expected[name], name
        turns *= 2  # if they were over before much could be done
    print(f"{stops} stops during {turns // 2} turns of {len(SYSCALLS)} calls")


def _disturbed(directory: Path, turns: int) -> tuple[int, dict[str, list[tuple[int, ...]]]]:
    """Return how often a target was stopped during these turns, and what its calls returned."""
    stops = 0
    with Syscalls(directory, turns) as target:
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
        return stops, target.returned()


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


class Forgetful(x86_64.X8664):
    """x86-64 with the ways of aarch64: a thread that stopped in a system call stands before it, as if never in it."""

    forgets_calls = True

    def repair(self, registers: Registers) -> NDArray[np.bool_]:
        before = registers.copy()
        super().repair(registers)
        registers[:] = x86_64.alone(registers)
        self.leave_call(registers)
        changed: NDArray[np.bool_] = (registers != before).any(1)
        return changed


@pytest.fixture(params=[False, True], ids=["as it is", "forgetful"])
def machine(request: pytest.FixtureRequest) -> Architecture:
    """This machine, and one that forgets the calls which a stop interrupts."""
    if not request.param:
        return native()
    if native().name != "x86_64":
        pytest.skip("it is imitated on x86-64")
    return Forgetful()


@pytest.mark.slow
@pytest.mark.parametrize("step", [Step.BOOTED, Step.WRITTEN, Step.DONE, Step.UNMAPPED])
@pytest.mark.parametrize("call", ["pause", "read", "restarted read", "nanosleep", "epoll_wait"])
def test_a_signal_that_comes_while_its_thread_stands_still_interrupts_its_call(
    only_blocks: None, machine: Architecture, observe: Observe, call: str, step: Step
) -> None:
    """A thread that waits for a signal would otherwise wait for ever after the signal was handled.

    It is the only thread, so it runs the stub.
    """
    interrupted = f"-1 {errno.EINTR}\n"
    sent = turn = 0

    def send(done: Step) -> None:
        nonlocal sent
        if done is step and sent < turn:
            os.kill(target.pid, signal.SIGUSR1)
            sent += 1

    observe(send)
    code = f"import select, signal\n{PREAMBLE}\nBLOCK, CALL = {BLOCK}, {call!r}\n{CALLER}"
    with subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as target:
        assert target.stdin is not None
        assert target.stdout is not None
        try:
            answers = target.stdout
            address = int(answers.readline())
            for turn in range(1, 5):
                until(lambda: threads_of(target.pid) == {target.pid: "S"}, "it to wait")
                with Process(target.pid) as process, MoverSession(process, GEOMETRY, machine=machine) as session:
                    session.move([(address, ORDER)])
                assert sent == turn
                if call != "restarted read":
                    assert wait_for(lambda: select.select([answers], [], [], 0)[0]), "it waits on"
                    assert answers.readline() == interrupted
            if call == "restarted read":
                target.stdin.write("x")
                target.stdin.flush()
                assert answers.readline() == "1 0\n"
        finally:
            target.kill()


@pytest.mark.slow
def test_queued_signals_keep_their_order_and_nobody_waits_for_what_has_come(
    only_blocks: None, machine: Architecture
) -> None:
    """Real-time signals, numbered, one after the other and in bursts, at a thread that waits for nothing else."""
    send = ctypes.CDLL(None, use_errno=True).sigqueue
    send.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p)
    moving = threading.Event()

    def queue() -> None:
        moving.wait()
        for number in range(1, QUEUED + 1):
            assert send(target.pid, signal.SIGRTMIN + 6, number) == 0
            time.sleep(random.choice((0, 0, 0.0002, 0.001, 0.003)))

    with subprocess.Popen([compiled("mover_queue"), str(BLOCK)], stdout=subprocess.PIPE, text=True) as target:
        assert target.stdout is not None
        address = int(target.stdout.readline())
        sender = threading.Thread(target=queue)
        sender.start()
        try:
            with (
                Process(target.pid) as process,
                MoverSession(
                    process, GEOMETRY, duty=1.0, max_pause_ns=10**7, stop_timeout_ns=60 * 10**9, machine=machine
                ) as session,
            ):
                moving.set()
                while sender.is_alive():
                    session.move([(address + random.randrange(16) * BLOCK, ORDER)])
            # It waits, and the next one is the last.
            until(lambda: threads_of(target.pid) == {target.pid: "S"}, "it to wait")
            assert send(target.pid, signal.SIGRTMIN + 6, 0) == 0
            assert wait_for(lambda: target.poll() is not None), "it waits on"
            assert target.stdout.readline() == f"{QUEUED} in order, 0 not\n"
        finally:
            moving.set()
            target.kill()
