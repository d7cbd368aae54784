"""Counters, and the event log: lines, a full disk, links and pipes in its place."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from mthp.daemon.telemetry import MOST_SERVICES, OTHERS, PAUSE_BUCKETS, EventLog, Pauses, Services
from mthp.errors import UsageError


def test_events_are_lines_and_a_log_that_was_moved_away_is_opened_anew(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "events"
    log = EventLog(path, said.append)
    log.write("start", pid=1)
    path.rename(tmp_path / "old")
    log.reopen()
    log.write("stop", pid=2)
    log.close()
    assert json.loads((tmp_path / "old").read_text())["event"] == "start"
    assert json.loads(path.read_text())["pid"] == 2
    assert said == []


def test_a_full_disk_is_said_once_and_what_is_missing_afterwards() -> None:
    said: list[str] = []
    log = EventLog(Path("/dev/full"), said.append)
    for number in range(5):
        log.write("collapsed", number=number)
    assert log.lost == 5
    assert len(said) == 1
    assert "No space left" in said[0]
    log.path = Path("/dev/null")
    log.reopen()
    log.write("collapsed")
    assert log.lost == 0
    assert "5 events are missing" in said[1]
    log.close()


def test_a_line_that_was_cut_short_is_ended_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events"
    log = EventLog(path, lambda line: None)
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, text: real(fd, text[:10]))
    log.write("one")
    monkeypatch.setattr(os, "write", real)
    log.write("two")
    log.close()
    lines = path.read_bytes().split(b"\n")
    assert len(lines[0]) == 10
    assert [json.loads(line)["event"] for line in lines[1:-1]] == ["lost", "two"]


def test_a_log_that_leads_elsewhere_is_refused(tmp_path: Path) -> None:
    """A user who may write in its directory could make the daemon write to any file."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    log = tmp_path / "events.jsonl"
    log.hardlink_to(precious)
    with pytest.raises(UsageError, match="several names"):
        EventLog(log, print)
    log.unlink()
    log.symlink_to(precious)
    if os.geteuid() == 0:
        os.lchown(log, 65534, 65534)
        with pytest.raises(UsageError, match="symbolic links"):
            EventLog(log, print)
        os.lchown(log, 0, 0)
    assert precious.read_text() == "precious"
    EventLog(log, print).close()


def test_a_log_that_is_a_pipe_holds_nobody_up(tmp_path: Path) -> None:
    pipe = tmp_path / "events"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match=re.escape(str(pipe))):
        EventLog(pipe, print)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    log = EventLog(pipe, print)
    while not log.lost:
        log.write("event", text="x" * 4096)
    os.close(reader)
    log.write("event")
    log.close()


def test_a_log_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="event log"):
        EventLog(tmp_path / "none" / "events", lambda line: None)


def test_pauses_fall_into_their_buckets() -> None:
    pauses = Pauses()
    pauses.add([10_000, 1_000_000, 1_000_001, 10**9])
    assert sum(pauses.buckets) == pauses.count == 4
    assert pauses.buckets[0] == 1
    assert pauses.buckets[PAUSE_BUCKETS.index(1e-3)] == 1
    assert pauses.buckets[PAUSE_BUCKETS.index(2.5e-3)] == 1
    assert pauses.buckets[-1] == 1
    summary = pauses.durations
    assert summary.max == 1.0
    assert summary.p50 <= summary.p99 <= summary.max
    assert Pauses().durations.p99 == 0.0


def test_processes_that_name_themselves_as_they_like_make_no_more_series_than_allowed() -> None:
    services = Services()
    for number in range(2 * MOST_SERVICES):
        services.of("all", f"comm:{number}").bloat_bytes += 1
    assert len(services.all()) == MOST_SERVICES + 1
    assert services.of("all", "comm:new") is services.of("all", OTHERS)
    assert services.of("all", OTHERS).bloat_bytes == MOST_SERVICES
    assert services.of("all", "comm:0").bloat_bytes == 1
    assert services.of("other", "comm:new").service == OTHERS
