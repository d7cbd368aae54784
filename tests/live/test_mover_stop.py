"""Targets that do not stop are let go, and Ctrl-C does not break a window."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from mover_targets import BLOCK, GEOMETRY, ORDER, Controlled, Observe, Writers, mappings, open_window
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.session import MoverSession, in_tracing_thread
from mthp.linux.mover.steps import Step
from mthp.linux.mover.tracee import CannotStopError
from mthp.linux.process import Process
from waiting import wait_for

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "mthp", "mover")]

STOP_TIMEOUT_NS = 60 * 10**9
"""On a machine with more to do than it can, a thread may not get to stopping for seconds."""


def test_a_target_in_vfork_is_let_go_whole(tmp_path: Path) -> None:
    with Controlled(tmp_path, "mover_vfork") as target:

        def progresses() -> bool:
            before = target.word(2)
            return wait_for(lambda: target.word(2) > before + 3)

        target.await_ready(lambda: target.word(1) == 1)
        assert progresses()
        with Process(target.pid) as process, pytest.raises(CannotStopError, match="does not stop"):
            open_window(process, stop_timeout_ns=50_000_000)
        assert progresses()
        target.put(0, 1)
        assert wait_for(lambda: target.word(1) == 2), "the thread that waited is still held"
        assert progresses()
        with Process(target.pid) as process:
            open_window(process)
        assert progresses()


def test_an_interrupt_waits_for_the_end_of_the_window(tmp_path: Path, only_blocks: None, observe: Observe) -> None:
    windows = 0

    def interrupt(step: Step) -> None:
        nonlocal windows
        if step is Step.PARKED:
            windows += 1
            if windows == 20:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.02)

    observe(interrupt)
    with Writers(tmp_path, 2, 4) as target:
        before = mappings(target.pid)
        blocks = [(address, ORDER) for address in range(target.base, target.base + target.size, BLOCK)]
        with (
            Process(target.pid) as process,
            MoverSession(process, GEOMETRY, duty=1.0, stop_timeout_ns=STOP_TIMEOUT_NS) as session,
        ):
            with pytest.raises(KeyboardInterrupt):
                session.move(blocks * 100)
            assert session.move(blocks[:1])[0].copied == BLOCK // GEOMETRY.page_size
        assert mappings(target.pid) == before
        assert target.progresses()
        assert target.finish() == 0


def test_an_interrupt_while_the_thread_of_a_window_starts_keeps_it_from_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No thread would wait for its end."""
    begun: list[None] = []
    start = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        start(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", interrupted)
        with pytest.raises(KeyboardInterrupt):
            in_tracing_thread(lambda: begun.append(None))
    for thread in threading.enumerate():
        if thread.name.startswith("mthp-mover"):
            thread.join()
    assert begun == []


@pytest.mark.slow
def test_an_error_of_ours_while_the_worker_runs_does_no_harm(
    tmp_path: Path, only_blocks: None, observe: Observe
) -> None:
    """Whatever happens after the worker was let run, the other threads stay parked until it is done."""
    failing = Step.WRITTEN

    def fail(step: Step) -> None:
        if step is failing:
            raise ZeroDivisionError

    observe(fail)
    with Writers(tmp_path, 4, 4) as target, Process(target.pid) as process:
        blocks = [(address, ORDER) for address in range(target.base, target.base + target.size, BLOCK)]
        for failing in (Step.WRITTEN, Step.PARKED, Step.RUNNING, Step.DONE, Step.FETCHED, Step.UNPARKED):
            for _ in range(3):
                session = MoverSession(process, GEOMETRY, duty=1.0, stop_timeout_ns=STOP_TIMEOUT_NS)
                with session, pytest.raises(ZeroDivisionError):
                    session.move(blocks)
                assert target.progresses(), failing.name
                assert target.errors == 0
        assert target.finish() == 0


def test_threads_that_exit_are_waited_for(tmp_path: Path) -> None:
    """A thread that exits still writes to memory, so a stopped process has none: only ours, stopped, and zombies."""
    with Writers(tmp_path, 1, 2, "t") as target, Process(target.pid) as process:
        for _ in range(300):
            seen: list[bool] = []

            def look(seen: list[bool] = seen) -> None:
                frozen = FrozenProcess(process, STOP_TIMEOUT_NS)
                frozen.stop({})
                try:
                    for task in Path(f"/proc/{target.pid}/task").iterdir():
                        state = (task / "stat").read_text().rsplit(")", 1)[1].split()[0]
                        seen.append(state in "tZX")
                finally:
                    frozen.release()

            thread = threading.Thread(target=look)
            thread.start()
            thread.join()
            assert seen
            assert all(seen)
        assert target.finish() == 0
