"""What goes wrong with a mover that does not know of it, and is not covered where its own matter is tested."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mover_targets import Writers, compiled, mappings
from mthp.geometry import X86_64
from mthp.linux.mover import inject, park, stub
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.session import MoverSession
from mthp.linux.mover.steps import Step
from mthp.linux.mover.tracee import CannotStopError, Stopped
from mthp.linux.process import Process
from mthp.results import ScanResult
from thp_switches import ThpSwitches
from waiting import wait_for

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "mthp", "4k-pages")]

ORDER = 4
BLOCK = X86_64.size_of(ORDER)


@pytest.fixture(autouse=True)
def only_64k(thp_switches: ThpSwitches) -> None:
    thp_switches.only("64kB", word="always")


@contextlib.contextmanager
def uring_target(directory: Path) -> Iterator[tuple[int, Callable[[int], int], Callable[[], int]]]:
    """A process with a registered buffer: its PID, words of its control page, and what is to be called at the end."""
    path = directory / "uring"
    path.write_bytes(bytes(4096))
    process = subprocess.Popen([compiled("mover_uring"), str(path)])
    with path.open("r+b") as file:
        control = mmap.mmap(file.fileno(), 4096)

    def word(index: int) -> int:
        return int(struct.unpack_from("=Q", control, 8 * index)[0])

    def outcome() -> int:
        struct.pack_into("=Q", control, 0, 1)
        assert wait_for(lambda: process.poll() is not None)
        return word(4)

    try:
        if not wait_for(lambda: word(1) or process.poll() is not None) or process.poll() is not None:
            pytest.skip("needs io_uring")
        yield process.pid, word, outcome
    finally:
        process.kill()
        process.wait()
        control.close()


def test_a_buffer_registered_with_io_uring_is_not_moved_and_its_data_arrives(tmp_path: Path) -> None:
    """Nobody has refused the process here; the kernel refuses the pages."""
    with uring_target(tmp_path) as (pid, word, outcome):
        with Process(pid) as process, MoverSession(process, X86_64, duty=1.0, max_pause_ns=10**7) as session:
            outcomes = session.move([(address, ORDER) for address in range(word(2), word(2) + word(3), BLOCK)])
        assert {(outcome.result, outcome.errno) for outcome in outcomes} == {(ScanResult.PAGE_COUNT, errno.EBUSY)}
        assert not any(outcome.moved_bytes for outcome in outcomes)
        assert outcome() == 1


SQPOLL = """
import ctypes, struct, time
libc = ctypes.CDLL(None, use_errno=True)
setup = ctypes.create_string_buffer(120)
struct.pack_into("I", setup, 8, 2)
if libc.syscall(425, 4, setup) < 0:
    print("none", flush=True)
time.sleep(0.1)
print("ready", flush=True)
time.sleep(600)
"""

SECCOMP = """
import ctypes, struct, time
libc = ctypes.CDLL(None)
allow_all = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0x7FFF0000))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 1, ctypes.addressof(allow_all)))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, ctypes.byref(program)) == 0
print("ready", flush=True)
time.sleep(60)
"""

MDWE = """
import ctypes, mmap, time
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):
    print("none", flush=True)
memory = mmap.mmap(-1, 1 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = b"x" * len(memory)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
print(-(-address // 65536) * 65536, flush=True)
time.sleep(600)
"""


@contextlib.contextmanager
def program(code: str) -> Iterator[tuple[int, str]]:
    """A Python process: its PID, and what it said first; skips the test if that is "none"."""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            said = process.stdout.readline().strip()
            if said == "none":
                pytest.skip("this kernel or these rights do not have it")
            yield process.pid, said
        finally:
            process.kill()


def test_a_thread_of_io_uring_is_not_given_our_code() -> None:
    with program(SQPOLL) as (pid, _), Process(pid) as process:
        before = mappings(pid)
        with pytest.raises(CannotStopError, match="io_uring"), MoverSession(process, X86_64):
            pass
        assert mappings(pid) == before
        assert process.is_alive()


def test_a_thread_of_the_kernel_is_known_by_its_registers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called: a process may rename its threads, and vhost has some, too."""
    monkeypatch.setattr("mthp.linux.mover.session.check_threads", lambda *_: {})
    monkeypatch.setattr("mthp.linux.mover.freeze.check_thread", lambda *_: None)
    with program(SQPOLL) as (pid, _), Process(pid) as process:
        before = mappings(pid)
        with pytest.raises(CannotStopError, match="kernel's"), MoverSession(process, X86_64):
            pass
        assert mappings(pid) == before
        assert process.is_alive()


def test_a_thread_that_has_come_to_filter_its_calls_is_not_given_our_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """All threads were looked at just before the stop; whoever is to run our code is looked at again after it."""
    monkeypatch.setattr("mthp.linux.mover.session.check_threads", lambda *_: dict.fromkeys(range(1 << 22)))
    with program(SECCOMP) as (pid, _), Process(pid) as process:
        before = mappings(pid)
        with pytest.raises(CannotStopError, match="seccomp"), MoverSession(process, X86_64):
            pass
        assert mappings(pid) == before
        assert process.is_alive()


def test_a_frozen_target_gets_its_registers_back(
    tmp_path: Path, frozen_cgroup: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its threads can be stopped, but run nothing of ours; and whoever kills us meanwhile would kill it."""
    monkeypatch.setattr(inject, "WORKER_TIMEOUT_NS", 300_000_000)
    with Writers(tmp_path, 2, 2) as target, Process(target.pid) as process:
        frozen_cgroup(target.pid)
        before = mappings(target.pid)
        with pytest.raises(CannotStopError, match="does not run"), MoverSession(process, X86_64):
            pass
        assert mappings(target.pid) == before
        target_cgroup = Path(f"/proc/{target.pid}/cgroup").read_text()
        assert "mthp-test" in target_cgroup
        thawed(target.pid)
        assert target.progresses()
        assert target.finish() == 0


def test_a_target_frozen_at_work_is_left_to_itself(
    tmp_path: Path, frozen_cgroup: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It finishes the window by itself when it is thawed; nobody waits for that."""
    monkeypatch.setattr(park, "WORKER_TIMEOUT_NS", 300_000_000)
    with Writers(tmp_path, 2, 2) as target, Process(target.pid) as process:

        def freeze(step: Step) -> None:
            if step is Step.ARMED:
                frozen_cgroup(target.pid)

        session = MoverSession(process, X86_64, duty=1.0, observer=freeze)
        with session, pytest.raises(CannotStopError, match="does not get on"):
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


def test_the_next_file_that_a_program_opens_has_the_number_that_it_expects(tmp_path: Path) -> None:
    """It may have closed one just now, to open another one in its place (dup2 by hand)."""
    with Writers(tmp_path, 1, 2) as target, Process(target.pid) as process:
        numbers = {int(path.name) for path in Path(f"/proc/{target.pid}/fd").iterdir()}
        size = int(process.status("FDSize") or 0)
        with MoverSession(process, X86_64) as session:
            now = {int(path.name) for path in Path(f"/proc/{target.pid}/fd").iterdir()}
            assert now - numbers == {session.uffd}
            assert session.uffd == size - 1
            assert process.status("FDSize") == str(size)
        assert {int(path.name) for path in Path(f"/proc/{target.pid}/fd").iterdir()} == numbers
        assert target.finish() == 0


REPLACE = """
import ctypes, mmap, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
print("ready", flush=True)
start, end = (int(word) for word in sys.stdin.readline().split())
assert libc.mmap(start, end - start, 3, 0x32, -1, 0) == start
ctypes.memset(start, 7, end - start)
print("mapped", flush=True)
sys.stdin.readline()
assert ctypes.string_at(start, end - start) == bytes([7]) * (end - start)
print("intact", flush=True)
"""


def test_what_a_program_maps_over_the_mover_is_not_unmapped_with_it() -> None:
    """A program with an address space of its own making may use MAP_FIXED where it knows that there is nothing."""
    with subprocess.Popen(
        [sys.executable, "-c", REPLACE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None

        def says(word: str, told: str = "") -> None:
            assert child.stdin is not None
            assert child.stdout is not None
            child.stdin.write(told)
            child.stdin.flush()
            assert child.stdout.readline() == word + "\n"

        says("ready")
        with Process(child.pid) as process:
            with MoverSession(process, X86_64) as session:
                assert session._injection is not None
                layout = session._injection.layout
                end = layout.scratch + layout.scratch_size
                says("mapped", f"{end - 16 * X86_64.page_size} {end}\n")
            says("intact", "\n")


def test_a_program_that_may_not_make_memory_executable_is_moved() -> None:
    """PR_SET_MDWE: what is to be executed must be so from the first, and cannot be written by the program."""
    with program(MDWE) as (pid, said), Process(pid) as process:
        with MoverSession(process, X86_64, duty=1.0) as session:
            (outcome,) = session.move([(int(said), ORDER)], verify=True)
        assert (outcome.result, outcome.verified) == (ScanResult.SUCCEED, True)


def test_a_signal_between_seizing_and_interrupting_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first stop of a thread is then that of the signal's delivery, and it waits for our leave to deliver it."""
    sent = 0

    def attach(stopped: Stopped) -> dict[int, int]:
        nonlocal sent
        threads = len(stopped.tids)
        stopped._attach.run(0, threads)
        for _ in range(3):
            os.kill(target.pid, signal.SIGRTMIN)
            sent += 1
            time.sleep(0.002)
        stopped._attach.run(threads, threads)
        return {}

    monkeypatch.setattr(Stopped, "attach", attach)
    with Writers(tmp_path, 2, 2) as target, Process(target.pid) as process:
        with MoverSession(process, X86_64, duty=1.0, stop_timeout_ns=60 * 10**9) as session:
            for number in range(10):
                session.move([(target.base + number * BLOCK, ORDER)])
        assert sent > 30
        assert wait_for(lambda: target.get("realtime_signals") == sent), (target.get("realtime_signals"), sent)
        assert target.finish() == 0


def test_scratch_memory_is_empty_before_it_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large fault of the data beside it may fill scratch memory, and what is there cannot be moved to (EEXIST)."""

    def spilled(frozen: FrozenProcess, remote: inject.RemoteCalls, layout: stub.Layout, uffd: int) -> None:
        frozen.write(layout.scratch, b"x")
        register(frozen, remote, layout, uffd)

    register = inject._register
    monkeypatch.setattr(inject, "_register", spilled)
    with Writers(tmp_path, 1, 2) as target, Process(target.pid) as process:
        with MoverSession(process, X86_64, duty=1.0) as session:
            assert session.move([(target.base, ORDER)])[0].errno == 0
        assert target.finish() == 0
