"""``mthp doctor --restore`` as a person runs it after a crash of mthp and of its watcher, as of a whole cgroup."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from e2e.helpers import mthp, mthp_json
from mthp.linux.journal.store import LOCK_NAME, default_root
from thp_switches import THP_ROOT, ThpSwitches, words_per_size

pytestmark = [pytest.mark.live, pytest.mark.requires("mthp", "root")]

CRASH = """
import os, signal
from mthp.linux.journal.switches import SwitchJournal
with SwitchJournal(watched=False).only(4):
    os.kill(os.getpid(), signal.SIGKILL)
"""
SIZE = f"hugepages-{os.sysconf('SC_PAGESIZE') >> 6}kB/enabled"
"""The switch of order 4."""


@pytest.fixture
def before(thp_switches: ThpSwitches) -> dict[str, str]:
    """The words of all switches before a crash, of which those of order 4 and one other are sure to be changed."""
    thp_switches.only("2048kB", word="always")
    return words_per_size()


def crash() -> None:
    assert subprocess.run([sys.executable, "-c", CRASH], check=False).returncode == -signal.SIGKILL


def test_puts_back_what_was_left_and_says_so(before: dict[str, str]) -> None:
    crash()
    assert "[always]" in (THP_ROOT / SIZE).read_text()
    answer = mthp_json("doctor", "--restore")
    assert words_per_size() == before
    assert {"switch": SIZE, "found": "always", "was": "never", "put_back": True} in answer["restored"]
    assert mthp_json("doctor", "--restore")["restored"] == []
    crash()
    done = mthp("doctor", "--restore")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"put back: {SIZE} from always to never\n" in done.stdout
    assert mthp("doctor", "--restore").stdout == "nothing to put back\n"


@pytest.mark.slow
def test_another_at_work(before: dict[str, str]) -> None:
    crash()
    left = words_per_size()
    with (default_root() / LOCK_NAME).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = mthp("doctor", "--restore", "--json")
    assert done.returncode == 1
    assert "another process" in json.loads(done.stdout)["error"]["message"]
    assert words_per_size() == left
    assert mthp("doctor", "--restore").returncode == 0
    assert words_per_size() == before
