"""The mover on live targets: right bytes, the planned orders, and nothing left behind."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.typing import NDArray

from mover_targets import BLOCK, BLOCK_SIZE, GEOMETRY, ORDER, Writers, mappings, pages_by_order
from mthp.errors import TargetVanishedError, UnsupportedError, UsageError
from mthp.linux import abi
from mthp.linux.live import open_live
from mthp.linux.mover import park, ptrace
from mthp.linux.mover import session as mover_session
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.inject import Injection
from mthp.linux.mover.session import MoverSession
from mthp.linux.process import Process
from mthp.means import Means
from mthp.ptes import ORDER_NONE, Block
from mthp.results import ScanResult
from targets import Puppet
from thp_switches import ThpSwitches, size_name
from waiting import FACTOR, wait_for

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "mthp", "mover")]

STOP_TIMEOUT_NS = 60 * 10**9
"""On a machine with more to do than it can, a thread may not get to stopping for seconds."""


def session_of(process: Process, **arguments: float) -> MoverSession:
    options = {"max_pause_ns": 5_000_000 * FACTOR, "duty": 1.0} | arguments
    return MoverSession(
        process,
        GEOMETRY,
        max_pause_ns=int(options["max_pause_ns"]),
        duty=options["duty"],
        stop_timeout_ns=STOP_TIMEOUT_NS,
    )


def blocks_of(target: Writers, order: int = ORDER) -> list[Block]:
    size = GEOMETRY.size_of(order)
    return [(address, order) for address in range(target.base, target.base + target.size, size)]


def make_whole(process: Process, target: Writers) -> None:
    """Have the kernel's collapse make new folios of those that forks left in pieces, which are refused for good."""
    for address in range(target.base, target.base + target.size, GEOMETRY.pmd_size):
        abi.process_madvise(process.pidfd, address, GEOMETRY.pmd_size, abi.MADV_COLLAPSE)


@pytest.mark.parametrize("order", [2, 4, 7, 8])
def test_one_thread_gets_the_wanted_order(tmp_path: Path, thp_switches: ThpSwitches, order: int) -> None:
    thp_switches.only()
    with Writers(tmp_path, 1, 4) as target:
        assert set(pages_by_order(target.pid, target.base, target.size)) == {0}
        before = mappings(target.pid)
        thp_switches.only(size_name(order), word="always")
        with Process(target.pid) as process, session_of(process) as session:
            outcomes = session.move(blocks_of(target, order), verify=True)
            assert mappings(target.pid) == before, "between two windows nothing is in the target"
        assert mappings(target.pid) == before
        assert not any("userfaultfd" in str(fd.readlink()) for fd in Path(f"/proc/{target.pid}/fd").iterdir())
        assert {(outcome.result, outcome.verified) for outcome in outcomes} == {(ScanResult.SUCCEED, True)}
        assert set(pages_by_order(target.pid, target.base, target.size)) == {order}
        assert os.sched_getscheduler(target.pid) == os.SCHED_OTHER
        assert target.progresses()
        assert target.finish() == 0


def test_a_block_that_did_not_get_its_order_is_reported(tmp_path: Path, thp_switches: ThpSwitches) -> None:
    thp_switches.only()
    with Writers(tmp_path, 1, 2) as target:
        with open_live(target.pid) as space:
            # The journal leaves the switches as they are: off.
            journal = SimpleNamespace(only=lambda *_, **__: contextlib.nullcontext())
            space._mover = space._make_mover(journal)  # type: ignore[arg-type]
            outcomes = space.collapse_blocks(blocks_of(target)[:3], Means("move", pause_share=1.0))
            assert space.take_pauses()
        assert {(outcome.result, outcome.copied) for outcome in outcomes} == {(ScanResult.ALLOC_HUGE_PAGE_FAIL, 0)}
        assert target.finish() == 0


@pytest.mark.slow
def test_many_threads_that_write_fork_and_take_signals(tmp_path: Path, only_blocks: None) -> None:
    """No wrong byte, no lost signal. MTHP_TEST_ROUNDS makes it long: 400 rounds are over 100 000 blocks moved."""
    rounds = int(os.environ.get("MTHP_TEST_ROUNDS", "4"))
    with Writers(tmp_path, 8, 16, "fts") as target:
        sent = 0
        stop = threading.Event()

        def send() -> None:
            nonlocal sent
            while not stop.wait(0.002):
                target.signal(signal.SIGRTMIN)
                sent += 1

        sender = threading.Thread(target=send)
        sender.start()
        moved = tried = 0
        results: Counter[ScanResult] = Counter()
        try:
            with Process(target.pid) as process, session_of(process) as session:
                while moved < rounds * target.size // BLOCK:
                    tried += 1
                    make_whole(process, target)
                    outcomes = session.move(blocks_of(target), verify=tried % 2 == 0)
                    results.update(outcome.result for outcome in outcomes)
                    moved += sum(outcome.copied == BLOCK // GEOMETRY.page_size for outcome in outcomes)
                    assert all(outcome.verified in (None, True) for outcome in outcomes)
                    assert target.errors == 0
                    assert tried < 200 * rounds, f"moved only {moved} blocks: {results}"
                stop.set()
                sender.join()
                assert wait_for(lambda: target.get("realtime_signals") == sent)
                # Without writers and children there is no copy on write, so folios stay as they were made. Pages that
                # the kernel still holds (EAGAIN) are not moved, and reported.
                target.set("stop", 1)
                assert wait_for(lambda: len(list(Path(f"/proc/{target.pid}/task").iterdir())) == 1)
                make_whole(process, target)
                at_rest = session.move(blocks_of(target), verify=True)
                whole = [outcome.address for outcome in at_rest if outcome.result is ScanResult.SUCCEED]
                assert {outcome.errno for outcome in at_rest} <= {0, errno.EAGAIN, errno.EBUSY}
                assert whole
                with open_live(target.pid) as space:
                    seen = space.read([(address, address + BLOCK) for address in whole]).folio_order
                assert set(seen.tolist()) == {ORDER}
        finally:
            stop.set()
            sender.join()
        vmas = [line for line in mappings(target.pid) if line.startswith(f"{target.base:x}-")]
        assert vmas == [f"{target.base:x}-{target.base + target.size:x} rw-p"]
        assert target.get("forks") > 0
        assert target.finish() == 0
        counts = {result.name: number for result, number in results.items()}
        print(f"{moved} blocks moved in {tried} rounds, {sent} signals,", end=" ")
        print(f"{target.get('forks')} forks, {target.get('spawned')} threads: {counts}")


@pytest.mark.slow
def test_without_stopping_the_target_it_would_go_wrong(
    tmp_path: Path, only_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: with all threads but the worker let go before the worker runs, the target sees wrong bytes."""

    def careless(frozen: FrozenProcess, injection: Injection, blocks: int) -> NDArray[np.void]:
        for tracee in list(frozen.tracees.values()):
            if tracee is not injection.worker:
                tracee.put_back()
                ptrace.detach(tracee.tid)
        return park.work(frozen, injection, blocks)

    monkeypatch.setattr(mover_session, "work", careless)
    with Writers(tmp_path, 4, 4) as target:
        with Process(target.pid) as process, session_of(process) as session:
            # With one processor, it takes a switch of threads in the middle.
            for _ in range(4000):
                session.move(blocks_of(target)[:16])
                if target.errors:
                    break
        assert target.errors > 0


def test_a_stopped_target_stays_stopped(tmp_path: Path, only_blocks: None) -> None:
    with Writers(tmp_path, 3, 4) as target:
        target.signal(signal.SIGSTOP)
        assert wait_for(lambda: target.state() == "T")
        with Process(target.pid) as process, session_of(process) as session:
            outcomes = session.move(blocks_of(target))
        assert {outcome.result for outcome in outcomes} == {ScanResult.SUCCEED}
        assert wait_for(lambda: target.state() == "T")
        before = target.rounds()
        time.sleep(0.1)
        assert target.rounds() == before
        target.signal(signal.SIGCONT)
        assert target.progresses()
        assert target.finish() == 0


@pytest.mark.slow
def test_stop_and_continue_at_any_moment(tmp_path: Path, only_blocks: None) -> None:
    with Writers(tmp_path, 3, 4) as target:
        stop = threading.Event()

        def disturb() -> None:
            while not stop.wait(0.001):
                target.signal(signal.SIGSTOP)
                target.signal(signal.SIGCONT)

        thread = threading.Thread(target=disturb)
        thread.start()
        try:
            with Process(target.pid) as process, session_of(process) as session:
                for _ in range(4):
                    session.move(blocks_of(target))
        finally:
            stop.set()
            thread.join()
        target.signal(signal.SIGCONT)
        assert target.progresses()
        assert target.finish() == 0


def test_a_target_that_exits_is_an_ordinary_event(tmp_path: Path) -> None:
    with Writers(tmp_path, 2, 2) as target, Process(target.pid) as process, session_of(process) as session:
        target.process.kill()
        with pytest.raises(TargetVanishedError):
            session.move(blocks_of(target) * 100)


def test_a_target_that_executes_another_program_is_left_alone() -> None:
    code = "import os, sys; print('ready', flush=True); input(); os.execv(sys.executable, [sys.executable, '-c', "
    code += "\"print('again', flush=True); input()\"])"
    arguments = [sys.executable, "-c", code]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdin is not None
        assert program.stdout is not None
        assert program.stdout.readline() == "ready\n"
        with Process(program.pid) as process, session_of(process) as session:
            assert session.move([(1 << 30, ORDER)])[0].result is not ScanResult.SUCCEED
            program.stdin.write("\n")
            program.stdin.flush()
            assert program.stdout.readline() == "again\n"
            with pytest.raises(TargetVanishedError, match="another"):
                session.move([(1 << 30, ORDER)])
        assert program.poll() is None
        program.stdin.close()
        assert program.wait() != signal.SIGSEGV


@pytest.fixture
def as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block with holes is not filled first, as on processors with protection keys."""
    monkeypatch.setattr(mover_session, "has_protection_keys", lambda: False)


@pytest.mark.usefixtures("as_it_is")
def test_what_the_kernel_refuses_stays_as_it_was(thp_switches: ThpSwitches) -> None:
    thp_switches.only()
    with Puppet() as puppet:
        hole, nothing = puppet.map(16 * BLOCK), 1 << 30
        puppet.write(hole, pages=8)
        with Process(puppet.pid) as process, session_of(process) as session:
            outcomes = session.move([(hole, ORDER), (nothing, ORDER)])
        assert [outcome.result for outcome in outcomes] == [ScanResult.PTE_NON_PRESENT] * 2
        assert all(outcome.reason for outcome in outcomes)
        assert set(pages_by_order(puppet.pid, hole + 8 * GEOMETRY.page_size, 8 * GEOMETRY.page_size)) == {ORDER_NONE}
        assert puppet.tell("read", hole, 16, 1) == 8


@pytest.mark.usefixtures("as_it_is")
def test_neighbours_are_moved_together_and_a_failure_stays_with_its_block(
    thp_switches: ThpSwitches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run with a hole the blocks before it are done at once, and the others when they are moved alone."""
    lengths: list[list[int]] = []

    def counting(frozen: FrozenProcess, injection: Injection, blocks: int) -> NDArray[np.void]:
        results = park.work(frozen, injection, blocks)
        lengths.append((results["length"] // BLOCK).tolist())
        return results

    monkeypatch.setattr(mover_session, "work", counting)
    thp_switches.only()
    with Puppet() as puppet:
        memory = puppet.map(16 * BLOCK)
        hole = memory + 5 * BLOCK + 3 * GEOMETRY.page_size
        puppet.write(memory, pages=5 * 16 + 3)
        puppet.write(hole + GEOMETRY.page_size, pages=10 * 16 + 12)
        thp_switches.only(BLOCK_SIZE, word="always")
        blocks = [(memory + number * BLOCK, ORDER) for number in range(16)]
        with Process(puppet.pid) as process, session_of(process, max_pause_ns=10**9) as session:
            # The first window has one block, from which the session learns.
            outcomes = session.move(blocks)
        assert lengths == [[1], [15], [1] * 11]
        assert [(outcome.address, outcome.order) for outcome in outcomes] == blocks
        expected = [ScanResult.SUCCEED] * 16
        expected[5] = ScanResult.PTE_NON_PRESENT
        assert [outcome.result for outcome in outcomes] == expected
        assert outcomes[5].errno == errno.EAGAIN
        assert set(pages_by_order(puppet.pid, memory, 5 * BLOCK)) == {ORDER}
        assert set(pages_by_order(puppet.pid, memory + 6 * BLOCK, 10 * BLOCK)) == {ORDER}
        assert set(pages_by_order(puppet.pid, hole, GEOMETRY.page_size)) == {ORDER_NONE}
        assert puppet.tell("read", memory, 256, 1) == 255


def test_a_block_that_holds_a_stack_pointer_is_left_alone(tmp_path: Path, only_blocks: None) -> None:
    with Writers(tmp_path, 2, 2) as target, Process(target.pid) as process, session_of(process) as session:
        stack = next(line for line in mappings(target.pid) if line.endswith("[stack]"))
        end = int(stack.split("-")[1].split()[0], 16)
        outcomes = session.move([(address, ORDER) for address in range(end // BLOCK * BLOCK - 2 * BLOCK, end, BLOCK)])
        assert any("stack pointer" in outcome.reason and not outcome.copied for outcome in outcomes)


def test_a_window_with_more_threads_than_there_was_room_for(tmp_path: Path, thp_switches: ThpSwitches) -> None:
    thp_switches.only()
    with Puppet() as puppet:
        memory = puppet.map(16 * BLOCK)
        puppet.write(memory, pages=256)
        thp_switches.only(BLOCK_SIZE, word="always")
        with Process(puppet.pid) as process, session_of(process) as session:
            for _ in range(80):
                puppet.tell("start_thread")
            outcomes = session.move([(memory + number * BLOCK, ORDER) for number in range(4)])
            assert {outcome.result for outcome in outcomes} == {ScanResult.SUCCEED}
            assert max(pause.threads for pause in session.pauses) == 81
        assert puppet.tell("read", memory, 256, 1) == 256


def test_a_changed_byte_would_be_reported(tmp_path: Path, only_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hashes come from the target; were they to differ, the block would not pass for a success."""

    def lying(frozen: FrozenProcess, injection: Injection, blocks: int) -> NDArray[np.void]:
        results = park.work(frozen, injection, blocks)
        changed = results.copy()
        assert (changed["hash_before"] != 0).all()
        changed["hash_after"] ^= np.uint64(1)
        return changed

    monkeypatch.setattr(mover_session, "work", lying)
    with Writers(tmp_path, 1, 2) as target, Process(target.pid) as process, session_of(process) as session:
        (outcome,) = session.move(blocks_of(target)[:1], verify=True)
        assert (outcome.result, outcome.verified) == (ScanResult.FAIL, False)


def test_wrong_usage_is_refused(tmp_path: Path) -> None:
    with Process("self") as myself, pytest.raises(UnsupportedError, match="itself"):
        MoverSession(myself, GEOMETRY)
    with Writers(tmp_path, 1, 2) as target, Process(target.pid) as process:
        for wrong in ({"duty": 0}, {"duty": 1.5}, {"max_pause_ns": 0}):
            with pytest.raises(UsageError):
                session_of(process, **wrong)
        with session_of(process) as session, pytest.raises(UsageError, match="aligned"):
            session.move([(target.base + GEOMETRY.page_size, ORDER)])
        with session_of(process) as session, pytest.raises(UsageError, match=GEOMETRY.label(GEOMETRY.pmd_order)):
            session.move([(target.base, GEOMETRY.pmd_order)])
