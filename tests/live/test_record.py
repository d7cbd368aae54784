"""Recording real processes: the watch finds what a full reading finds, and the file survives the recorder."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mthp.errors import UsageError
from mthp.linux.live import open_live
from mthp.linux.watch import ROUNDS
from mthp.ptes import Pte
from mthp.snapshot import Recording
from mthp.snapshot.recorder import StepTaker
from mthp.snapshot.recording import RecordingStep, _State
from targets import MADV_COLLAPSE, MADV_FREE, MADV_NOHUGEPAGE, PAGE_SIZE, PMD_SIZE, Puppet
from waiting import PATIENCE, until

pytest.importorskip("pyarrow")
pytestmark = [
    pytest.mark.live,
    pytest.mark.requires("pfns", "thp", "4k-pages", "pagemap_scan"),
    pytest.mark.usefixtures("thp_switches"),
]

SIZE = 24 * PMD_SIZE


class _Replay:
    """Return the state that a reader of the recording has after each step."""

    def __init__(self, pid: int) -> None:
        self.space = open_live(pid)
        self.taker = StepTaker(self.space)
        self.rows = 0
        path = "replay"
        recording = type("R", (), {"path": path, "description": self.taker.description, "traced": False})
        self._state = _State(recording)  # type: ignore[arg-type]

    def step(self) -> None:
        meta, runs = self.taker.take()
        self.rows = len(runs)
        self._state.add(meta, runs)

    def differs(self, address: int, size: int = SIZE) -> int:
        """Pages of which the recording says something else than a full reading now."""
        told = self._state.space(RecordingStep(0, 0.0, 0.0, {}, 0)).read([(address, address + size)])
        seen = self.space.read([(address, address + size)])
        return int(np.count_nonzero((told.state != seen.state) | (told.folio_order != seen.folio_order)))


def test_every_change_is_seen_at_the_next_step() -> None:
    with Puppet() as puppet:
        address = puppet.map(SIZE, advice=MADV_NOHUGEPAGE)
        puppet.write(address, SIZE // PAGE_SIZE)
        replay = _Replay(puppet.pid)
        replay.step()
        assert replay.differs(address) == 0
        replay.step()
        assert replay.differs(address) == 0
        changes: list[Callable[[], object]] = [
            lambda: puppet.tell("munmap", address + PMD_SIZE + 8 * PAGE_SIZE, 4 * PAGE_SIZE),
            lambda: puppet.tell("munmap", address + 3 * PMD_SIZE, 2 * PMD_SIZE),
            lambda: puppet.tell("madvise", address + 6 * PMD_SIZE, 16 * PAGE_SIZE, 4),
            lambda: puppet.tell("madvise", address + 8 * PMD_SIZE, PMD_SIZE, 4),
        ]
        for change in changes:
            change()
            replay.step()
            assert replay.differs(address) == 0
            assert replay.rows > 0


def test_a_collapse_and_a_split_are_seen_at_the_next_step() -> None:
    with Puppet() as puppet:
        address = puppet.map(SIZE)
        puppet.write(address, SIZE // PAGE_SIZE)
        replay = _Replay(puppet.pid)
        replay.step()
        for each in range(3):
            puppet.tell("madvise", address + each * PMD_SIZE, PMD_SIZE, MADV_COLLAPSE)
        replay.step()
        assert replay.differs(address) == 0
        told = replay.space.read([(address, address + PMD_SIZE)])
        assert told.has(Pte.PMD_MAPPED).all()
        # A page of the middle one away: its PMD entry is replaced by PTEs, the other frames stay.
        puppet.tell("madvise", address + PMD_SIZE + PAGE_SIZE, PAGE_SIZE, 4)
        puppet.tell("mprotect", address + 2 * PMD_SIZE, PMD_SIZE // 2, 1)
        replay.step()
        assert not replay.space.read([(address + 2 * PMD_SIZE, address + 3 * PMD_SIZE)]).has(Pte.PMD_MAPPED).any()
        assert replay.differs(address) == 0


def test_what_pagemap_does_not_tell_is_seen_some_steps_later() -> None:
    with Puppet() as puppet:
        puppet.stay_on_one_cpu()
        address = puppet.map(SIZE, advice=MADV_NOHUGEPAGE)
        puppet.write(address, SIZE // PAGE_SIZE)
        replay = _Replay(puppet.pid)
        replay.step()
        puppet.tell("madvise", address, SIZE, MADV_FREE)
        puppet.drain_lru_batches()
        for _ in range(ROUNDS):
            replay.step()
        assert replay.differs(address) == 0


def _recorder(pid: int, path: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mthp", "record", str(pid), "-o", str(path), "--every", "50ms", "--cpu", "100%"]
    process = subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until(lambda: _steps(path) >= 3 or process.poll() is not None, "three steps")
    assert process.poll() is None, process.communicate()
    return process


def _steps(path: Path) -> int:
    try:
        return len(Recording(path).steps)
    except UsageError:
        return 0


@pytest.mark.slow
def test_what_was_written_is_readable_after_a_kill(tmp_path: Path) -> None:
    with Puppet() as puppet:
        address = puppet.map(4 * PMD_SIZE)
        puppet.write(address, 4 * 512)
        recorder = _recorder(puppet.pid, tmp_path / "r")
        recorder.kill()
        recorder.communicate()
        recording = Recording(tmp_path / "r")
        assert len(recording.steps) >= 3
        assert "cut off" in recording.trouble
        with open_live(puppet.pid) as space:
            wanted = [(address, address + 4 * PMD_SIZE)]
            assert np.array_equal(recording.space().read(wanted).folio_order, space.read(wanted).folio_order)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_recording_in_order(tmp_path: Path, number: signal.Signals) -> None:
    with Puppet() as puppet:
        recorder = _recorder(puppet.pid, tmp_path / "r")
        recorder.send_signal(number)
        out, err = recorder.communicate(timeout=PATIENCE)
        assert recorder.returncode == (0 if number == signal.SIGINT else 128 + number), err
        assert "ended because it was stopped" in out
        assert Recording(tmp_path / "r").end == "stopped"


def test_a_recording_survives_the_end_of_its_target(tmp_path: Path) -> None:
    with Puppet() as puppet:
        recorder = _recorder(puppet.pid, tmp_path / "r")
        puppet.kill()
        out, err = recorder.communicate(timeout=PATIENCE)
        assert recorder.returncode == 0, err
        assert "ended because the target exited" in out
        recording = Recording(tmp_path / "r")
        assert recording.end == "the target exited"
        assert recording.steps[-1].counters["minflt"] > 0
        assert any(name.startswith("hugepages-2048kB/") for name in recording.steps[0].counters)
