"""The journal on the machine's own switches: faults bring the one size, and no signal leaves anything behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from early_imports import import_all
from journal_owners import watchers_of
from mthp.errors import NotPermittedError
from mthp.linux.journal.store import has_entries
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.live import open_live
from targets import PMD_ORDER, PMD_SIZE, Puppet
from thp_switches import THP_ROOT, ThpSwitches, size_name, words_per_size
from waiting import until

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


ENDS = [(signal.SIGINT,), (signal.SIGTERM,), (signal.SIGHUP,), (signal.SIGKILL,), (signal.SIGSTOP, signal.SIGKILL)]
KILLS = int(os.environ.get("MTHP_TEST_KILLS", "5"))
"""How many there are of each kind."""


def is_settled(root: Path, wanted: dict[str, str]) -> bool:
    """Return whether all switches are as `wanted`, the journal in `root` is empty, and no watcher is left."""
    return words_per_size() == wanted and not has_entries(root) and not watchers_of(root)


@pytest.fixture
def machine_words(thp_switches: ThpSwitches) -> dict[str, str]:
    """The words of all switches. Changes of a test are always put back."""
    for path in THP_ROOT.glob("hugepages-*kB/enabled"):
        name = str(path.relative_to(THP_ROOT))
        text = path.read_text()
        thp_switches.set(name, text[text.index("[") + 1 : text.index("]")])
    return words_per_size()


@pytest.mark.requires("pfns")
@pytest.mark.parametrize("order", [2, 4, 7, PMD_ORDER])
def test_faults_bring_that_size(machine_words: dict[str, str], tmp_path: Path, order: int) -> None:
    journal = SwitchJournal(tmp_path / "mthp")
    with Puppet() as puppet, open_live(puppet.pid) as space:
        address = puppet.map(PMD_SIZE)
        with journal.only(order):
            puppet.write(address)
        assert words_per_size() == machine_words
        columns = space.read([(address, address + (PMD_SIZE))])
    assert columns.folio_order[: 1 << order].tolist() == [order] * (1 << order)
    assert not (columns.state[1 << order :]).any()


def test_what_an_administrator_has_set_meanwhile_stays(
    machine_words: dict[str, str], thp_switches: ThpSwitches, tmp_path: Path
) -> None:
    root = tmp_path / "mthp"
    program = WINDOWS.replace("pass", "sys.stdin.read()")
    with subprocess.Popen([sys.executable, "-c", program, str(root)], stdin=subprocess.PIPE) as child:
        # The inner window turns the order of the outer one off again.
        inner = f"hugepages-{size_name(5)}/enabled"
        until(lambda: "[always]" in (THP_ROOT / inner).read_text(), "the inner window")
        thp_switches.set(inner, "madvise")
        wanted = machine_words | {str(THP_ROOT / inner): (THP_ROOT / inner).read_text()}
        child.kill()
    until(lambda: is_settled(root, wanted), lambda: f"{wanted}: {words_per_size()}")


def test_switches_that_may_not_be_written(machine_words: dict[str, str]) -> None:
    nobody = 65534
    directory = Path(tempfile.mkdtemp())
    os.chown(directory, nobody, nobody)
    import_all()
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
    assert words_per_size() == machine_words
