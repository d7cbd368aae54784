"""The journal on the machine's own switches: faults bring the one size, and no signal leaves anything behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from mthp.errors import NotPermittedError
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.live import open_live
from targets import PMD_ORDER, PMD_SIZE, Puppet
from thp_switches import THP_ROOT, ThpSwitches
from waiting import wait_for

pytestmark = [pytest.mark.live, pytest.mark.requires("mthp", "root")]

WINDOWS = """
import sys
from pathlib import Path
from mthp.linux.journal.switches import SwitchJournal
journal = SwitchJournal(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    with journal.only(4):
        with journal.only(5):
            pass
"""


def words() -> dict[str, str]:
    return {str(path): path.read_text() for path in sorted(THP_ROOT.glob("hugepages-*kB/enabled"))}


@pytest.fixture
def machine_words(thp_switches: ThpSwitches) -> dict[str, str]:
    """The words of all switches; what a test leaves changed is put back whatever comes."""
    for path in THP_ROOT.glob("hugepages-*kB/enabled"):
        name = str(path.relative_to(THP_ROOT))
        text = path.read_text()
        thp_switches.set(name, text[text.index("[") + 1 : text.index("]")])
    return words()


@pytest.mark.requires("pfns")
@pytest.mark.parametrize("order", [2, 4, 7, PMD_ORDER])
def test_faults_bring_that_size(machine_words: dict[str, str], tmp_path: Path, order: int) -> None:
    journal = SwitchJournal(tmp_path / "mthp")
    with Puppet() as puppet, open_live(puppet.pid) as space:
        address = puppet.map(PMD_SIZE)
        with journal.only(order):
            puppet.write(address)
        assert words() == machine_words
        columns = space.read([(address, address + (PMD_SIZE))])
    assert columns.folio_order[: 1 << order].tolist() == [order] * (1 << order)
    assert not (columns.state[1 << order :]).any()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_at_any_moment(machine_words: dict[str, str], tmp_path: Path, number: signal.Signals) -> None:
    root = tmp_path / "mthp"
    left = 0
    for attempt in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", WINDOWS, str(root)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as child:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
            assert wait_for(lambda: words() != machine_words), "no window begins"
            time.sleep(0.0007 * attempt)
            # The interpreter swallows a KeyboardInterrupt in a few of its places.
            child.send_signal(number)
            while not wait_for(lambda child=child: child.poll() is not None, 10):  # type: ignore[misc]
                child.send_signal(number)
        left += words() != machine_words
        restored = SwitchJournal(root).restore_after_crash()
        assert words() == machine_words
        assert all(each.put_back for each in restored)
    if number == signal.SIGINT:
        assert left == 0
    else:
        # Otherwise nothing was tried: nearly all of the time it is in a window.
        assert left


def test_two_processes_at_once(machine_words: dict[str, str], tmp_path: Path) -> None:
    program = WINDOWS.replace("while True", "for _ in range(30)")
    children = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "mthp")], stdout=subprocess.DEVNULL)
        for _ in range(3)
    ]
    assert [child.wait() for child in children] == [0, 0, 0]
    assert words() == machine_words


def test_switches_that_may_not_be_written(machine_words: dict[str, str]) -> None:
    nobody = 65534
    directory = Path(tempfile.mkdtemp())
    os.chown(directory, nobody, nobody)
    pid = os.fork()
    if pid == 0:
        try:
            os.setuid(nobody)
            with SwitchJournal(directory / "mthp").only(4):
                os._exit(1)
        except NotPermittedError:
            os._exit(0)
        finally:
            os._exit(2)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert not (directory / "mthp").exists()
    finally:
        shutil.rmtree(directory)
    assert words() == machine_words
