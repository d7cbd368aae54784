"""SIGINT, SIGTERM and SIGHUP end every long command in order, with the exit code of a shell; nohup(1) is respected."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from e2e.helpers import MTHP, mthp
from mthp.linux.journal.store import JOURNAL_NAME, default_root
from mthp.linux.journal.switches import SwitchJournal
from thp_switches import THP_ROOT, ThpSwitches, size_name
from waiting import PATIENCE, until

SCENARIO = """
duration = "3600s"
[machine]
memory = "256M"
[[process]]
workload = "service"
core = "4M"
burst = "2M"
every = "1s"
count = 8
"""
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def started(*arguments: object, ignored: Sequence[signal.Signals] = ()) -> subprocess.Popen[str]:
    """Start mthp as a job of its own, and wait until it handles signals (SigCgt of proc_pid_status(5))."""
    # A child inherits ignored signals, and has the default action for the others.
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING}
    try:
        for number in ignored:
            signal.signal(number, signal.SIG_IGN)
        process = subprocess.Popen(
            [*MTHP, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    wanted = sum(1 << number - 1 for number in ENDING if number not in ignored)
    until(lambda: process.poll() is not None or _caught(process.pid) & wanted == wanted, "it to handle signals")
    return process


def _caught(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("SigCgt:")).split()[1], 16)


def ended(process: subprocess.Popen[str]) -> int:
    _, err = process.communicate(timeout=PATIENCE)
    assert "Traceback" not in err, err
    return process.returncode


def arguments_of(command: str, directory: Path) -> list[object]:
    if command == "simulate":
        scenario = directory / "scenario.toml"
        scenario.write_text(SCENARIO)
        return ["simulate", scenario, "-o", directory / "rows.parquet"]
    if command == "record":
        return ["record", "self", "-o", directory / "recording", "--every", "100ms"]
    return ["demo", "--seconds", "600", "--size", "32M"]


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("command", ["simulate", "demo"])
def test_the_exit_code_is_that_of_a_shell(command: str, number: signal.Signals, tmp_path: Path) -> None:
    process = started(*arguments_of(command, tmp_path))
    process.send_signal(number)
    assert ended(process) == 128 + number


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_was_ignored_stays_so(number: signal.Signals, tmp_path: Path) -> None:
    process = started(*arguments_of("record", tmp_path), ignored=[number])
    until((tmp_path / "recording").exists, "a recording")
    process.send_signal(number)
    assert not _caught(process.pid) & (1 << number - 1)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == 128 + signal.SIGTERM


def test_a_closed_terminal(tmp_path: Path) -> None:
    """Its processes get SIGHUP, and their writes fail."""
    arguments = [*MTHP, *map(str, arguments_of("simulate", tmp_path))]
    pid, leader = pty.fork()
    if pid == 0:
        os.execv(arguments[0], arguments)
    until(lambda: _caught(pid) & 1 << signal.SIGHUP - 1, "it to handle signals")
    os.close(leader)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGHUP


@pytest.mark.requires("mthp", "root")
def test_the_next_command_puts_back_what_a_killed_cgroup_left(thp_switches: ThpSwitches) -> None:
    switch = THP_ROOT / f"hugepages-{size_name(4)}" / "enabled"
    before = switch.read_text()
    pid = os.fork()
    if pid == 0:
        with SwitchJournal(watched=False).only(4):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert switch.read_text() != before
    done = mthp("inspect", "self", "--json")
    assert done.returncode == 0
    assert f"a killed mthp had changed this switch; put back: {switch.parent.name}/enabled from always" in done.stderr
    assert switch.read_text() == before
    assert (default_root() / JOURNAL_NAME).read_bytes() == b""
    assert mthp("inspect", "self").stderr == ""
