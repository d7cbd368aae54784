"""What others can reach of the mover: nothing that outlives a window, and nothing that a child inherits."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from mover_targets import BLOCK, BLOCK_SIZE, GEOMETRY, ORDER, Observe, Writers, belongings, program
from mthp.linux.mover import leftovers
from mthp.linux.mover.leftovers import find_leftovers, remove_leftovers
from mthp.linux.mover.session import MoverSession
from mthp.linux.mover.steps import Step
from mthp.linux.probes import NR_USERFAULTFD
from mthp.linux.process import Process
from mthp.results import ScanResult
from thp_switches import ThpSwitches
from waiting import until

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "mthp", "mover")]

STOP_TIMEOUT_NS = 60 * 10**9

FORKING = f"""
import ctypes, mmap, os, sys
memory = mmap.mmap(-1, 64 * {BLOCK}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = b"x" * len(memory)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
counts = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 16)
print(-(-address // {BLOCK}) * {BLOCK}, flush=True)

def inherited():
    files = [os.readlink(f"/proc/self/fd/{{name}}") for name in os.listdir("/proc/self/fd") if name.isdigit()
             and os.path.lexists(f"/proc/self/fd/{{name}}")]
    lines = [line.split() for line in open("/proc/self/maps")]
    stubs = [line for line in lines if line[1] == "r-xp" and line[4] == "0" and len(line) == 5]
    return bool(stubs) or any("userfaultfd" in file for file in files)

while True:
    child = os.fork()
    if not child:
        # A worker that drops its rights, and looks at what it has of its parent's.
        os.setresuid(65534, 65534, 65534)
        os._exit(1 if inherited() else 0)
    _, status = os.waitpid(child, 0)
    counts[0:8] = (int.from_bytes(counts[0:8], "little") + 1).to_bytes(8, "little")
    counts[8:16] = (int.from_bytes(counts[8:16], "little") + bool(status)).to_bytes(8, "little")
"""
FORKS = 300


def test_a_child_inherits_nothing_of_the_mover(tmp_path: Path, thp_switches: ThpSwitches) -> None:
    """With the descriptor of a userfaultfd, a child could write into its parent's memory."""
    thp_switches.only(BLOCK_SIZE, word="always")
    counts = tmp_path / "counts"
    counts.write_bytes(bytes(16))

    def count(at: int) -> int:
        return int.from_bytes(counts.read_bytes()[at : at + 8], sys.byteorder)

    with program(FORKING, str(counts)) as (pid, said), Process(pid) as process:
        until(lambda: count(0) > 0, "the first child")
        windows, moved = 0, 0
        with MoverSession(process, GEOMETRY, duty=0.5, stop_timeout_ns=STOP_TIMEOUT_NS) as session:
            while count(0) < FORKS:
                outcomes = session.move([(int(said) + windows % 32 * BLOCK, ORDER)])
                moved += sum(outcome.result is ScanResult.SUCCEED for outcome in outcomes)
                windows += 1
        assert (count(8), moved > 0) == (0, True), f"{count(8)} of {count(0)} children in {windows} windows"
        print(f"{count(0)} children, {windows} windows, {moved} blocks moved, {count(8)} inherited something")


READING = f"""
import ctypes, mmap, os, sys
memory = mmap.mmap(-1, 64 * {BLOCK}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = b"x" * len(memory)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
counts = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 8)
libc = ctypes.CDLL(None)
print(-(-address // {BLOCK}) * {BLOCK}, flush=True)
while True:
    for line in open("/proc/self/maps").read().splitlines():
        span, permissions, _, _, inode = line.split()[:5]
        start, end = (int(word, 16) for word in span.split("-"))
        if permissions.startswith("r") and permissions.endswith("p") and inode == "0" and "[v" not in line:
            libc.memchr(ctypes.c_void_p(start), 0, ctypes.c_size_t(0))
            for page in range(start, end, mmap.PAGESIZE):
                ctypes.string_at(page, 1)
    counts[0:8] = (int.from_bytes(counts[0:8], "little") + 1).to_bytes(8, "little")
"""


def test_a_target_that_reads_all_of_its_memory_does_not_wait(tmp_path: Path, thp_switches: ThpSwitches) -> None:
    """As a conservative garbage collector, a checkpointer or a crash handler does."""
    thp_switches.only(BLOCK_SIZE, word="always")
    counts = tmp_path / "counts"
    counts.write_bytes(bytes(8))

    def rounds() -> int:
        return int.from_bytes(counts.read_bytes(), sys.byteorder)

    with program(READING, str(counts)) as (pid, said), Process(pid) as process:
        until(lambda: rounds() > 0, "the first round")
        with MoverSession(process, GEOMETRY, duty=0.5, stop_timeout_ns=STOP_TIMEOUT_NS) as session:
            for number in range(32):
                session.move([(int(said) + number * BLOCK, ORDER)])
            before = rounds()
            until(lambda: rounds() > before + 2, "a round within an open session")
        assert process.is_alive()


def test_between_two_windows_a_target_has_what_it_had(
    tmp_path: Path, thp_switches: ThpSwitches, observe: Observe
) -> None:
    """And within one, only while all of its threads are stopped."""
    thp_switches.only(BLOCK_SIZE, word="always")
    seen: dict[Step, bool] = {}

    def look(step: Step) -> None:
        seen[step] = belongings(target.pid)[0] == before

    with Writers(tmp_path, 2, 2) as target, Process(target.pid) as process:
        before = belongings(target.pid)[0]
        observe(look)
        with MoverSession(process, GEOMETRY, duty=1.0) as session:
            session.move([(target.base, ORDER)])
            assert belongings(target.pid)[0] == before
        # After the command to unmap everything, the worker may or may not have done so.
        clean = {step for step, same in seen.items() if same} - {Step.UNMAPPING}
        assert clean == {Step.STOPPED, Step.LOADED, Step.BOOTED, Step.UNPARKED} | {
            each for each in Step if each >= Step.UNMAPPED
        }
        assert target.finish() == 0


LEFT = """
import ctypes, mmap, os, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
page, scratch_size = mmap.PAGESIZE, int(sys.argv[2])
base = libc.mmap(None, 2 * page + scratch_size, 3, 0x22, -1, 0)
uffd = libc.syscall(int(sys.argv[3]), 0x80001)
ctypes.memmove(base + 16, bytes.fromhex(sys.argv[1]), 32)
ctypes.memmove(base + page, struct.pack("=4Q", 2, 0, base + 2 * page, uffd), 32)
libc.mprotect(base, page, 5)
print(uffd, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("mark", leftovers._OLD_MARKS, ids=["x86-64", "aarch64"])
def test_what_an_older_version_left_is_found_and_removed(mark: bytes) -> None:
    number = NR_USERFAULTFD[os.uname().machine]
    with program("import time\nprint('ready', flush=True)\ntime.sleep(600)") as (clean, _):
        assert [each for each in find_leftovers(GEOMETRY.pmd_size) if each.pid == clean] == []
    with program(LEFT, mark[:32].hex(), str(GEOMETRY.pmd_size), str(number)) as (pid, said):
        before = belongings(pid)
        (leftover,) = [each for each in find_leftovers(GEOMETRY.pmd_size) if each.pid == pid]
        assert (leftover.uffd, leftover.end - leftover.start) == (int(said), 2 * GEOMETRY.page_size + GEOMETRY.pmd_size)
        (removed,) = [each for each in remove_leftovers() if each.pid == pid]
        assert str(removed).startswith("removed: ")
        after = belongings(pid)
        assert set(before[1]) - set(after[1]) == {said}
        assert len(before[0]) - len(after[0]) == 2
        assert [each for each in find_leftovers(GEOMETRY.pmd_size) if each.pid == pid] == []
        assert Path(f"/proc/{pid}/status").exists()
