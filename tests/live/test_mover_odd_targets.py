"""Unusual targets of the mover: unchanged, and refused with the reason.

No test here needs a switch set: what matters is what happens to the target, not which folios it gets.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mover_targets import (
    BLOCK,
    GEOMETRY,
    ORDER,
    PREAMBLE,
    READY,
    SQPOLL,
    TRACER,
    Observe,
    Writers,
    is_refused,
    open_window,
    program,
)
from mthp.errors import TargetVanishedError, UnsupportedError
from mthp.linux.mover import inject
from mthp.linux.mover.arch import native
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.refuse.block import BlockRefusal
from mthp.linux.mover.session import MoverSession
from mthp.linux.mover.steps import Step
from mthp.linux.mover.tracee import CannotStopError, Stopped
from mthp.linux.process import Process
from targets import STRICT, is_strict
from waiting import until, wait_for

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "mthp", "mover")]

WORKER_TIMEOUT_NS = 300_000_000
"""Nanoseconds to wait for a thread that cannot run."""


def test_a_thread_of_the_kernel_is_known_by_its_name() -> None:
    with program(PREAMBLE + SQPOLL + READY) as (pid, _):
        is_refused(pid, "io_uring")


def test_a_thread_of_the_kernel_is_known_by_its_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called: a process may rename its threads, and vhost has some, too."""
    monkeypatch.setattr("mthp.linux.mover.session.check_threads", lambda *_: {})
    monkeypatch.setattr("mthp.linux.mover.freeze.check_thread", lambda *_: None)
    with program(PREAMBLE + SQPOLL + READY) as (pid, _):
        is_refused(pid, "kernel's")


def test_a_thread_that_has_come_to_filter_its_calls_is_not_given_our_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads are checked just before the stop; the thread that runs the stub is checked again after it."""
    monkeypatch.setattr("mthp.linux.mover.session.check_threads", lambda *_: dict.fromkeys(range(1 << 22)))
    with program(PREAMBLE + "filter_calls()" + READY) as (pid, _):
        is_refused(pid, "seccomp")


def test_a_thread_that_has_just_come_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = "def guard():\n    filter_calls()\n    print('ready', flush=True)\n    time.sleep(600)\nthread(guard)\n"
    with program(PREAMBLE + guard + "time.sleep(600)") as (pid, _):
        monkeypatch.setattr("mthp.linux.mover.session.check_threads", lambda *_: {pid: None})
        is_refused(pid, "seccomp")


def test_a_target_that_filters_system_calls_is_refused() -> None:
    with program("print('ready', flush=True)\n" + STRICT) as (pid, _):
        until(lambda: is_strict(pid), "seccomp")
        is_refused(pid, "seccomp")


def test_a_traced_target_is_refused(tmp_path: Path) -> None:
    with Writers(tmp_path, 2, 2) as target:
        with program(PREAMBLE + TRACER + READY, str(target.pid)):
            is_refused(target.pid, "traced already")
        assert target.progresses()


def test_a_frozen_target_gets_its_registers_back(tmp_path: Path, frozen_cgroup: Callable[[int], None]) -> None:
    """Its threads can be stopped but cannot run the stub, and killing mthp meanwhile would kill it."""
    with Writers(tmp_path, 2, 2) as target:
        frozen_cgroup(target.pid)
        is_refused(target.pid, "does not run", worker_timeout_ns=WORKER_TIMEOUT_NS)
        assert "mthp-test" in Path(f"/proc/{target.pid}/cgroup").read_text()
        thawed(target.pid)
        assert target.progresses()
        assert target.finish() == 0


def test_a_target_frozen_at_work_is_left_to_itself(
    tmp_path: Path, frozen_cgroup: Callable[[int], None], observe: Observe
) -> None:
    """It finishes the window by itself when it is thawed; mthp does not wait for that."""
    with Writers(tmp_path, 2, 2) as target, Process(target.pid) as process:

        def freeze(step: Step) -> None:
            if step is Step.WRITTEN:
                frozen_cgroup(target.pid)

        observe(freeze)
        with (
            MoverSession(process, GEOMETRY, duty=1.0, worker_timeout_ns=WORKER_TIMEOUT_NS) as session,
            pytest.raises(CannotStopError, match="does not run"),
        ):
            session.move([(target.base, ORDER), (target.base + BLOCK, ORDER)])
        assert not target.progresses(0.2)
        thawed(target.pid)
        assert target.progresses()
        assert target.finish() == 0


def thawed(pid: int) -> None:
    """Thaw the cgroup of a process."""
    path = next(line[3:] for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines() if line.startswith("0::"))
    mount = next(line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line)
    Path(mount + path, "cgroup.freeze").write_text("0")


LIMITS = """
import resource
fd = os.open("/dev/null", os.O_RDONLY)
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits = {"files": (resource.RLIMIT_NOFILE, fd + 1), "memory": (resource.RLIMIT_AS, size)}
resource.setrlimit(limits[WHAT][0], (limits[WHAT][1],) * 2)
"""


@pytest.mark.parametrize("what", ["files", "memory"])
def test_a_target_at_its_limits_is_left_as_it_was(what: str) -> None:
    with program(f"{PREAMBLE}\nWHAT = {what!r}\n{LIMITS}{READY}") as (pid, _):
        is_refused(pid, "nothing can be injected", UnsupportedError)


def test_a_program_that_locks_whatever_it_maps_is_left_as_it_was() -> None:
    """Locked pages cannot be moved, so the mover's own memory would be of no use."""
    with program(f"{PREAMBLE}\nassert libc.mlockall(2) == 0{READY}") as (pid, _):
        is_refused(pid, "locks all memory", UnsupportedError)


DISPATCH = """
if libc.prctl(59, 1, ctypes.c_ulong(0), ctypes.c_ulong(1 << 47), 0):
    print("none", flush=True)
"""


def test_a_program_that_intercepts_its_system_calls_is_refused() -> None:
    """As Wine does; ours would be handed to its handler, too."""
    with program(PREAMBLE + DISPATCH + READY) as (pid, _):
        is_refused(pid, "intercepts")


OTHER_SEGMENT = """
# a far jmp to a pointer that lies behind it, segment 0x23 (QEMU does not emulate a far ret), and there, in 32-bit code:
# jmp to itself
at = libc.mmap(None, 4096, 7, 0x62, -1, 0)
if at == ctypes.c_void_p(-1).value:
    print("none", flush=True)
code = bytes([0xFF, 0x2D, 0, 0, 0, 0]) + struct.pack("=IH", at + 16, 0x23)
ctypes.memmove(at, code.ljust(16, bytes([0x90])) + bytes([0xEB, 0xFE]), 18)
thread(ctypes.CFUNCTYPE(None)(at))
time.sleep(0.1)
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="it is machine code")
def test_a_thread_that_runs_32_bit_code_in_a_64_bit_process_is_refused() -> None:
    with program(PREAMBLE + OTHER_SEGMENT + READY) as (pid, _):
        is_refused(pid, "64-bit")


def test_a_thread_that_cannot_be_seized_yet_runs_to_its_end_before_anything_is_moved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel says EPERM of a thread that is exiting, which still writes to memory."""
    attach, left = Stopped.attach, 3

    def refusing(stopped: Stopped) -> dict[int, int]:
        nonlocal left
        if victim not in stopped.tids or not left:
            return attach(stopped)
        left -= 1
        if others := [tid for tid in stopped.tids if tid != victim]:
            assert attach(Stopped(stopped.machine, others)) == {}
        return {victim: 1}

    monkeypatch.setattr(Stopped, "attach", refusing)
    with Writers(tmp_path, 2, 2) as target, Process(target.pid) as process:
        victim = max(int(path.name) for path in Path(f"/proc/{target.pid}/task").iterdir())
        frozen = FrozenProcess(process, 10**10)
        try:
            frozen.stop({})
            assert victim in frozen.tracees
            assert left == 0
        finally:
            frozen.release()
        assert target.finish() == 0


LEADERLESS = """
import ctypes, sys, threading, time
threading.Thread(target=time.sleep, args=(600,)).start()
print("ready", flush=True)
sys.stdin.readline()
ctypes.CDLL(None).pthread_exit(None)
"""


def test_a_dead_first_thread_is_not_waited_for() -> None:
    """It stays a zombie as long as others live, and cannot be seized."""
    with subprocess.Popen(
        [sys.executable, "-c", LEADERLESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        try:
            assert child.stdout is not None
            assert child.stdin is not None
            assert child.stdout.readline() == "ready\n"
            with Process(child.pid) as process:
                child.stdin.write("\n")
                child.stdin.flush()
                assert wait_for(lambda: b"\nState:\tZ" in process.read("status"))
                frozen = FrozenProcess(process, 10**10)
                try:
                    frozen.stop({})
                    assert list(frozen.tracees) != [child.pid]
                except TargetVanishedError:
                    # Its memory went with its first thread. Only where the kernel tells of a thread that it is in a
                    # system call, nothing of it is to be read.
                    assert native().forgets_calls
                finally:
                    frozen.release()
        finally:
            child.kill()


def test_a_thread_outside_of_restartable_sequences_is_preferred() -> None:
    """A thread inside of one must begin it again after it ran the stub."""
    tracees = {tid: SimpleNamespace(tid=tid, rseq_abort=abort) for tid, abort in ((1, 7), (2, 0), (3, 0))}
    frozen = cast("Any", SimpleNamespace(tracees=tracees, process=SimpleNamespace(pid=1)))
    assert inject.choose(frozen).tid == 2
    tracees[2].rseq_abort = tracees[3].rseq_abort = 7
    assert inject.choose(frozen).tid == 1


OWN_FILES = """
def work():
    assert libc.unshare(0x400) == 0
    print(threading.get_native_id(), flush=True)
    time.sleep(600)
thread(work)
time.sleep(600)
"""


def test_a_thread_with_files_of_its_own_is_not_chosen() -> None:
    """The userfaultfd is a number of the first thread's table."""
    with program(PREAMBLE + OWN_FILES) as (pid, said):
        other = int(said)
        tracees = {tid: SimpleNamespace(tid=tid, rseq_abort=abort) for tid, abort in ((pid, 7), (other, 0))}
        frozen = cast("Any", SimpleNamespace(tracees=tracees, process=SimpleNamespace(pid=pid)))
        assert inject.choose(frozen).tid == pid
        del tracees[pid]
        assert inject.choose(frozen).tid == other


def test_a_stop_signal_that_comes_while_we_make_calls_is_not_lost(tmp_path: Path, observe: Observe) -> None:
    """SIGSTOP cannot be blocked, and stops the thread that runs the stub; afterwards the process is stopped."""
    sent = 0

    def stop(step: Step) -> None:
        nonlocal sent
        if step is Step.MAPPED:
            sent += 1
            target.signal(signal.SIGSTOP)

    with Writers(tmp_path, 2, 2) as target, Process(target.pid) as process:
        observe(stop)
        open_window(process)
        assert sent == 1
        assert wait_for(lambda: target.state() == "T")
        target.signal(signal.SIGCONT)
        assert target.progresses()
        assert target.finish() == 0


@pytest.mark.slow
@pytest.mark.parametrize("step", Step)
def test_a_target_that_is_killed_at_any_step_has_vanished(tmp_path: Path, observe: Observe, step: Step) -> None:
    def kill(done: Step) -> None:
        if done is step:
            target.signal(signal.SIGKILL)

    observe(kill)
    with Writers(tmp_path, 2, 2) as target, Process(target.pid) as process:
        with pytest.raises(TargetVanishedError), MoverSession(process, GEOMETRY, duty=1.0) as session:
            session.move([(target.base, ORDER)] * 3)
        assert wait_for(lambda: target.process.poll() is not None), "it was not reaped"


def test_a_block_that_holds_an_rseq_area_is_left_alone(tmp_path: Path) -> None:
    """The kernel writes there when the thread goes back to its program."""
    with Writers(tmp_path, 2, 2) as target, Process(target.pid) as process:

        def look() -> list[int]:
            frozen = FrozenProcess(process)
            try:
                frozen.stop({})
                return [int(area) for area in frozen.stopped.rseq_areas if area]
            finally:
                frozen.release()

        with ThreadPoolExecutor(1) as executor:
            areas = executor.submit(look).result()
        if not areas:
            pytest.skip("needs a C library that registers rseq areas")
        blocks = sorted({(area & -GEOMETRY.size_of(2), 2) for area in areas})
        with MoverSession(process, GEOMETRY, duty=1.0) as session:
            assert {outcome.reason for outcome in session.move(blocks)} == {BlockRefusal.SPECIAL.objection.reason}
        assert target.finish() == 0
