"""A thread that is stopped inside a restartable sequence continues at the sequence's abort handler."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from mover_targets import GEOMETRY, ORDER, Controlled
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.session import MoverSession
from mthp.linux.mover.tracee import Stopped
from mthp.linux.process import Process
from mthp.ptes import Block
from waiting import wait_for

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "mthp", "mover")]

WINDOWS = 40
FATES = 2048
COMMITTED, ABORTED = 1, 2


def _fates_of_disturbed_sequences(directory: Path) -> list[int]:
    """Move memory of a target that is in a sequence most of the time; the fate of each sequence that was disturbed."""
    disturbed: list[int] = []

    def look(frozen: FrozenProcess, batch: Sequence[Block]) -> list[None]:
        if frozen.tracees[program.pid].rseq_abort:
            disturbed.append(program.word(4) % FATES)
        return [None] * len(batch)

    with Controlled(directory, "mover_rseq") as program:
        if not wait_for(lambda: program.word(1) or program.ended()) or program.ended():
            pytest.skip("needs rseq(2) and a C library that registers it")
        with Process(program.pid) as target, MoverSession(target, GEOMETRY, duty=1.0, recheck=look) as session:
            for _ in range(WINDOWS):
                session.move([(program.word(2), ORDER)])
                time.sleep(0.01)
        wait_for(lambda: all(program.control[40 + number] for number in disturbed))
        return [program.control[40 + number] for number in disturbed]


@pytest.mark.slow
def test_a_disturbed_sequence_is_aborted(tmp_path: Path, only_blocks: None) -> None:
    fates = _fates_of_disturbed_sequences(tmp_path)
    assert fates
    assert set(fates) == {ABORTED}


@pytest.mark.slow
def test_without_care_it_would_be_committed(tmp_path: Path, only_blocks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def where_it_stopped(stopped: Stopped) -> None:
        stopped.homes[:] = stopped.registers

    monkeypatch.setattr(Stopped, "settle", where_it_stopped)
    assert COMMITTED in _fates_of_disturbed_sequences(tmp_path)
