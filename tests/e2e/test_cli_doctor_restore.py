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
from thp_switches import THP_ROOT, ThpSwitches

pytestmark = [pytest.mark.live, pytest.mark.requires("mthp", "root")]

CRASH = """
import os, signal
from mthp.linux.journal.switches import SwitchJournal
with SwitchJournal(watched=False).only(4):
    os.kill(os.getpid(), signal.SIGKILL)
"""
SIZE = f"hugepages-{os.sysconf('SC_PAGESIZE') >> 6}kB/enabled"
"""The switch of order 4."""


def words() -> dict[str, str]:
    return {str(path.relative_to(THP_ROOT)): path.read_text() for path in THP_ROOT.glob("hugepages-*kB/enabled")}


@pytest.fixture
def before(thp_switches: ThpSwitches) -> dict[str, str]:
    """The words of all switches before a crash, of which those of order 4 and one other are sure to be changed."""
    for name in words():
        thp_switches.set(name, "never")
    thp_switches.set("hugepages-2048kB/enabled", "always")
    return words()


def crash() -> None:
    assert subprocess.run([sys.executable, "-c", CRASH], check=False).returncode == -signal.SIGKILL


def test_puts_back_what_was_left(before: dict[str, str]) -> None:
    crash()
    assert "[always]" in words()[SIZE]
    answer = mthp_json("doctor", "--restore")
    assert words() == before
    assert {"switch": SIZE, "found": "always", "was": "never", "put_back": True} in answer["restored"]
    assert mthp_json("doctor", "--restore")["restored"] == []


def test_says_so(before: dict[str, str]) -> None:
    crash()
    done = mthp("doctor", "--restore")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"put back: {SIZE} from always to never\n" in done.stdout
    assert words() == before
    assert mthp("doctor", "--restore").stdout == "nothing to put back\n"


def test_leaves_alone_what_somebody_else_changed(before: dict[str, str], thp_switches: ThpSwitches) -> None:
    crash()
    thp_switches.set(SIZE, "madvise")
    done = mthp("doctor", "--restore")
    assert done.returncode == 0
    assert f"left alone: {SIZE} was never, and is madvise now" in done.stdout
    assert "[madvise]" in words()[SIZE]
    assert {name: text for name, text in words().items() if name != SIZE} == {
        name: text for name, text in before.items() if name != SIZE
    }


@pytest.mark.slow
def test_another_at_work(before: dict[str, str]) -> None:
    crash()
    left = words()
    with (default_root() / LOCK_NAME).open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = mthp("doctor", "--restore", "--json")
    assert done.returncode == 1
    assert "another process" in json.loads(done.stdout)["error"]["message"]
    assert words() == left
    assert mthp("doctor", "--restore").returncode == 0
    assert words() == before
