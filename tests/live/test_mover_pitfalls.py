"""Pitfalls of the mover that the tests of its parts do not cover."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest

from mover_targets import (
    BLOCK,
    GEOMETRY,
    ORDER,
    Controlled,
    Writers,
    program,
)
from mthp.linux.live import open_live
from mthp.linux.mover.refuse.pinned import HELD
from mthp.linux.mover.session import MoverSession
from mthp.linux.mover.tracee import Stopped
from mthp.linux.process import Process
from mthp.means import Means
from mthp.results import ScanResult
from thp_switches import ThpSwitches
from waiting import wait_for

pytestmark = [
    pytest.mark.live,
    pytest.mark.requires("root", "mthp", "mover"),
    pytest.mark.usefixtures("only_blocks"),
]


def test_a_buffer_registered_with_io_uring_is_not_moved_and_its_data_arrives(
    tmp_path: Path, thp_switches: ThpSwitches
) -> None:
    """The process is not refused; the kernel refuses the pages."""
    # Some kernels would try to split a pinned folio for as long as it is pinned: linux/mover/refuse/pinned.
    thp_switches.only()
    with Controlled(tmp_path, "mover_uring") as target:
        if not wait_for(lambda: target.word(1) or target.ended()) or target.ended():
            pytest.skip("needs io_uring")
        base, size = target.word(2), target.word(3)
        with Process(target.pid) as process, MoverSession(process, GEOMETRY, duty=1.0, max_pause_ns=10**7) as session:
            outcomes = session.move([(address, ORDER) for address in range(base, base + size, BLOCK)])
        assert {(outcome.result, outcome.errno) for outcome in outcomes} == {(ScanResult.PAGE_COUNT, errno.EBUSY)}
        assert not any(outcome.copied for outcome in outcomes)
        target.put(0, 1)
        assert wait_for(target.ended)
        assert target.word(4) == 1


IN_A_PIPE = f"""
import ctypes, mmap, os, time
memory = mmap.mmap(-1, 8 * {BLOCK}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
base = -(-address // {2 * BLOCK}) * {2 * BLOCK}
ctypes.memset(base, 7, 4 * {BLOCK})
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]
pipe, end = os.pipe()
page = mmap.PAGESIZE
assert ctypes.CDLL(None).vmsplice(end, ctypes.byref(Vector(base + page, page)), 1, 0) == page
print(base, flush=True)
time.sleep(600)
"""


def test_a_large_folio_that_a_pipe_holds_is_left_alone() -> None:
    """Some kernels retry the split while it is pinned, with the target stopped."""
    order, size = ORDER + 1, 2 * BLOCK
    with program(IN_A_PIPE) as (pid, said), open_live(pid) as space:
        base = int(said)
        segment = [(base, base + 2 * size)]
        assert set(space.read(segment).folio_order.tolist()) == {ORDER}
        means = Means(mechanism="move", max_pause=1.0, pause_share=1.0, verify=True)
        held, free = space.collapse_blocks([(base, order), (base + size, order)], means)
        assert (held.result, held.reason) == (HELD.result, HELD.reason)
        assert free.result is ScanResult.SUCCEED
        orders = space.read(segment).folio_order
        assert set(orders[: 1 << ORDER].tolist()) == {ORDER}, "that could not be split"
        assert set(orders[2 << ORDER :].tolist()) == {order}


MDWE = f"""
import ctypes, mmap, time
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):
    print("none", flush=True)
memory = mmap.mmap(-1, 4 * {BLOCK}, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = b"x" * len(memory)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
print(-(-address // {BLOCK}) * {BLOCK}, flush=True)
time.sleep(600)
"""


def test_a_program_that_may_not_make_memory_executable_is_moved() -> None:
    """PR_SET_MDWE: memory must be executable from the start, and the program cannot write it."""
    with program(MDWE) as (pid, said), Process(pid) as process:
        with MoverSession(process, GEOMETRY, duty=1.0) as session:
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
        with MoverSession(process, GEOMETRY, duty=1.0, stop_timeout_ns=60 * 10**9) as session:
            for number in range(10):
                session.move([(target.base + number * BLOCK, ORDER)])
        assert sent == 30
        assert wait_for(lambda: target.get("realtime_signals") == sent), (target.get("realtime_signals"), sent)
        assert target.finish() == 0
