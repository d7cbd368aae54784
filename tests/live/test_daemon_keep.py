"""The daemon keeps the system's max_ptes_none while it runs, and whatever ends it has the number put back."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemons import RunningDaemon
from journal_owners import watchers_of
from mthp.linux.journal.store import default_root, has_entries
from thp_switches import THP_ROOT, ThpSwitches
from waiting import until

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "thp")]

FILE = THP_ROOT / "khugepaged/max_ptes_none"


@pytest.fixture(autouse=True)
def number(thp_switches: ThpSwitches) -> Iterator[str]:
    was = FILE.read_text().strip()
    thp_switches.set("khugepaged/max_ptes_none", was)
    yield was
    assert FILE.read_text().strip() == was


def put_back(number: str) -> bool:
    return FILE.read_text().strip() == number and not has_entries(default_root())


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_it_is_put_back_whatever_ends_the_daemon(tmp_path: Path, number: str, by: signal.Signals) -> None:
    with RunningDaemon(tmp_path, "--comm", "nothing-has-this-name", "--keep-max-ptes-none", "3") as daemon:
        until(lambda: FILE.read_text().strip() == "3", lambda: daemon.said)
        assert daemon.status()["keep_max_ptes_none"] == 3
        restored = subprocess.run(
            [sys.executable, "-m", "mthp", "doctor", "--restore"], capture_output=True, text=True, check=True
        )
        assert "nothing to put back" in restored.stdout
        assert FILE.read_text().strip() == "3"
        daemon.stop(by)
    until(lambda: put_back(number), FILE.read_text)


@pytest.mark.slow
def test_after_a_kill_with_the_watcher_the_next_mthp_puts_it_back(tmp_path: Path, number: str) -> None:
    with RunningDaemon(tmp_path, "--comm", "nothing-has-this-name", "--keep-max-ptes-none", "3") as daemon:
        until(lambda: FILE.read_text().strip() == "3", lambda: daemon.said)
        # The watcher first: it acts within milliseconds.
        for watcher in watchers_of(default_root()):
            os.kill(watcher, signal.SIGKILL)
        daemon.stop(signal.SIGKILL)
    assert FILE.read_text().strip() == "3"
    done = subprocess.run(
        [sys.executable, "-m", "mthp", "doctor", "--restore"], capture_output=True, text=True, check=True
    )
    assert f"from 3 to {number}" in done.stdout
    assert put_back(number)


def test_the_rules_file_is_read_again(tmp_path: Path, number: str) -> None:
    rules = tmp_path / "rules.toml"

    def write(line: str) -> None:
        rules.write_text(f'[daemon]\n{line}\n[[rule]]\nmatch = {{ comm = "nothing-has-this-name" }}\n')

    write("keep_max_ptes_none = 3")
    with RunningDaemon(tmp_path / "run", "--config", str(rules)) as daemon:
        until(lambda: FILE.read_text().strip() == "3", lambda: daemon.said)
        for line, wanted in (("keep_max_ptes_none = 5", "5"), ("", number)):
            write(line)
            daemon.process.send_signal(signal.SIGHUP)
            until(lambda wanted=wanted: FILE.read_text().strip() == wanted, lambda: daemon.said)  # type: ignore[misc]
