"""What others can reach of the mover: nothing that outlives a window, and nothing that a child inherits."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mover_targets import GEOMETRY, ORDER, Observe, Writers, belongings, program
from mthp.linux.mover import leftovers
from mthp.linux.mover.leftovers import find_leftovers, remove_leftovers
from mthp.linux.mover.session import MoverSession
from mthp.linux.mover.steps import Step
from mthp.linux.probes import NR_USERFAULTFD
from mthp.linux.process import Process

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "mthp", "mover")]

STOP_TIMEOUT_NS = 60 * 10**9


def test_between_two_windows_a_target_has_what_it_had(tmp_path: Path, only_blocks: None, observe: Observe) -> None:
    """And within one, only while all of its threads are stopped."""
    seen: dict[Step, bool] = {}

    def look(step: Step) -> None:
        seen[step] = belongings(target.pid) == before

    with Writers(tmp_path, 2, 2) as target, Process(target.pid) as process:
        before = belongings(target.pid)
        observe(look)
        with MoverSession(process, GEOMETRY, duty=1.0) as session:
            session.move([(target.base, ORDER)])
            assert belongings(target.pid) == before
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
