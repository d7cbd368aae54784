"""A thread that is stopped inside a restartable sequence continues at the sequence's abort handler."""

from __future__ import annotations

import mmap
import struct
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mover_targets import BLOCK_SIZE, GEOMETRY, ORDER, compiled
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.session import MoverSession
from mthp.linux.mover.tracee import Stopped
from mthp.linux.process import Process
from mthp.ptes import Block
from thp_switches import ThpSwitches
from waiting import wait_for

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "mthp", "mover")]

WINDOWS = 40
FATES = 2048
COMMITTED, ABORTED = 1, 2


def _fates_of_disturbed_sequences(directory: Path) -> list[int]:
    """Move memory of a target that is in a sequence most of the time; the fate of each sequence that was disturbed."""
    path = directory / "rseq"
    path.write_bytes(b"\0" * 4096)
    process = subprocess.Popen([compiled("mover_rseq"), str(path)])
    with path.open("r+b") as file:
        control = mmap.mmap(file.fileno(), 4096)

    def word(index: int) -> int:
        return int(struct.unpack_from("=Q", control, 8 * index)[0])

    disturbed: list[int] = []

    def look(frozen: FrozenProcess, batch: Sequence[Block]) -> list[None]:
        if frozen.tracees[process.pid].rseq_abort:
            disturbed.append(word(4) % FATES)
        return [None] * len(batch)

    try:
        if not wait_for(lambda: word(1) or process.poll() is not None) or process.poll() is not None:
            pytest.skip("needs rseq(2) and a C library that registers it")
        with Process(process.pid) as target, MoverSession(target, GEOMETRY, duty=1.0, recheck=look) as session:
            for _ in range(WINDOWS):
                session.move([(word(2), ORDER)])
                time.sleep(0.01)
        wait_for(lambda: all(control[40 + number] for number in disturbed))
        return [control[40 + number] for number in disturbed]
    finally:
        process.kill()
        process.wait()
        control.close()


@pytest.mark.slow
def test_a_disturbed_sequence_is_aborted(tmp_path: Path, thp_switches: ThpSwitches) -> None:
    thp_switches.only(BLOCK_SIZE, word="always")
    fates = _fates_of_disturbed_sequences(tmp_path)
    assert fates
    assert set(fates) == {ABORTED}


@pytest.mark.slow
def test_without_care_it_would_be_committed(
    tmp_path: Path, thp_switches: ThpSwitches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def where_it_stopped(stopped: Stopped) -> None:
        stopped.homes[:] = stopped.registers

    thp_switches.only(BLOCK_SIZE, word="always")
    monkeypatch.setattr(Stopped, "settle", where_it_stopped)
    assert COMMITTED in _fates_of_disturbed_sequences(tmp_path)
