"""What mthp has set on the machine is put back whatever ends it: a collapse by moving, and the daemon.

MTHP_TEST_KILLS says how many of each kind are ended, at random moments of a window.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemons import RunningDaemon
from e2e.helpers import MTHP
from journal_owners import watchers_of
from mover_targets import LEFT_SECONDS, Writers, belongings
from mthp.linux.journal.store import default_root, has_entries
from thp_switches import THP_ROOT, size_name, words_per_size
from waiting import PATIENCE, until, wait_for

pytestmark = [
    pytest.mark.usefixtures("thp_switches"),
    pytest.mark.live,
    pytest.mark.slow,
    pytest.mark.requires("root", "mthp", "mover", "pagemap_scan", "4k-pages"),
]

KILLS = int(os.environ.get("MTHP_TEST_KILLS", "3"))
ENDS = [(signal.SIGKILL,), (signal.SIGHUP,), (signal.SIGTERM,), (signal.SIGSTOP, signal.SIGKILL)]
MOVING = ("--mechanism", "move", "--orders", "64K", "--max-ptes-none", "0")


@pytest.fixture
def slowest() -> Iterator[list[float]]:
    """The seconds until everything was put back, each time; the test says the longest."""
    seconds: list[float] = []
    yield seconds
    print(f"{len(seconds)} ended: everything was put back after {max(seconds, default=0):.3f} s at most")


def put_back(wanted: dict[str, str]) -> float:
    """Wait until all switches are as `wanted`, the journal is empty and no watcher is left; return the seconds."""
    begin = time.perf_counter()
    root = default_root()
    until(
        lambda: words_per_size() == wanted and not has_entries(root) and not watchers_of(root),
        lambda: f"{wanted}: {words_per_size()}, watchers {watchers_of(root)}",
    )
    return time.perf_counter() - begin


def is_as_before(target: Writers, before: object) -> None:
    """Check that a target runs, with its mappings, files and bytes unchanged."""
    assert target.survives(), f"the target was killed: {target.process.returncode}"
    assert wait_for(lambda: belongings(target.pid) == before, LEFT_SECONDS), "something is left in the target"
    assert target.finish() == 0


def in_a_window(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> bool:
    """Wait for a random moment of a window; return False if the process ends before."""
    until(lambda: has_entries(default_root()) or process.poll() is not None, "a window")
    time.sleep(random.random() / 20)
    return process.poll() is None


@pytest.mark.parametrize("numbers", ENDS, ids=lambda numbers: "+".join(each.name for each in numbers))
def test_a_collapse(tmp_path: Path, numbers: tuple[signal.Signals, ...], slowest: list[float]) -> None:
    words = words_per_size()
    while len(slowest) < KILLS:
        with Writers(tmp_path, 2, 8) as target:
            before = belongings(target.pid)
            command = [*MTHP, "collapse", str(target.pid), *MOVING, "--pause-share", "0.1"]
            with subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, process_group=0
            ) as process:
                in_time = in_a_window(process)
                for number in numbers:
                    os.killpg(process.pid, number)
                code = process.wait(PATIENCE)
            seconds = put_back(words)
            is_as_before(target, before)
        if in_time:
            assert code in (-numbers[-1], 128 + numbers[-1], 0)
            slowest.append(seconds)


def test_a_stopped_collapse_goes_on(tmp_path: Path) -> None:
    """While it is stopped, switches are put back. Then it continues its batch, verifies the orders, and ends."""
    words = words_per_size()
    with Writers(tmp_path, 2, 16) as target:
        command = [*MTHP, "collapse", str(target.pid), *MOVING, "--pause-share", "0.1"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            until(lambda: "[always]" in (THP_ROOT / f"hugepages-{size_name(4)}/enabled").read_text(), "a window")
            process.send_signal(signal.SIGSTOP)
            try:
                until(lambda: words_per_size() == words, "the watcher to see a stopped process")
                assert not wait_for(lambda: words_per_size() != words, 0.5)
            finally:
                process.send_signal(signal.SIGCONT)
            assert process.wait(PATIENCE) in (0, 1)
        put_back(words)
        assert target.finish() == 0


@pytest.mark.parametrize("numbers", [(signal.SIGKILL,), (signal.SIGTERM,), (signal.SIGSTOP, signal.SIGKILL)])
def test_the_daemon(tmp_path: Path, numbers: tuple[signal.Signals, ...], slowest: list[float]) -> None:
    words = words_per_size()
    for number in range(KILLS):
        with Writers(tmp_path, 2, 8) as target:
            before = belongings(target.pid)
            arguments = ("--pid", str(target.pid), *MOVING)
            with RunningDaemon(tmp_path / f"daemon-{number}", *arguments, wait=False) as daemon:
                assert in_a_window(daemon.process), daemon.said
                for each in numbers:
                    os.killpg(daemon.process.pid, each)
                assert daemon.process.wait(PATIENCE) in (-numbers[-1], 0)
            slowest.append(put_back(words))
            is_as_before(target, before)
