"""The demo's workload without its process: what it computes, what it answers, how it is sized, how it fails."""

from __future__ import annotations

import json
import stat
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mthp.demo import client, workload
from mthp.demo.client import MIN_SIZE, Workload, fit_size
from mthp.errors import MthpError, TargetVanishedError, UnsupportedError, UsageError

GIB = 1 << 30


@pytest.fixture(scope="module")
def database() -> Iterator[workload.Database]:
    """A small database in this process; the tests below do not change it."""
    database = workload.Database()
    database.grow(workload.anonymous_bytes() + (12 << 20), lambda done, total, phase: None)
    yield database
    database._db.close()


class Machine:
    """A procfs and a control group tree of our own."""

    def __init__(self, root: Path) -> None:
        self.proc, self.cgroup = root / "proc", root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        self.cgroup.mkdir()
        self.belongs_to("0::/")

    def available(self, size: int) -> None:
        (self.proc / "meminfo").write_text(f"MemTotal:  99999999 kB\nMemAvailable:   {size >> 10} kB\n")

    def belongs_to(self, *lines: str) -> None:
        (self.proc / "self/cgroup").write_text("".join(line + "\n" for line in lines))

    def group(self, path: str, **files: object) -> None:
        directory = self.cgroup / path
        directory.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            (directory / f"memory.{name}").write_text(f"{value}\n")

    def fit(self, wanted: int) -> int:
        return fit_size(wanted, proc=self.proc, cgroup=self.cgroup)


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.available(64 * GIB)
    return machine


class TestFitSize:
    def test_what_is_wanted_where_there_is_plenty(self, machine: Machine) -> None:
        assert machine.fit(GIB) == GIB

    @pytest.mark.parametrize("available", [GIB, 700 << 20])
    def test_peak_stays_within_half_of_what_is_available(self, machine: Machine, available: int) -> None:
        machine.available(available)
        assert available * 0.45 < machine.fit(GIB) < machine.fit(GIB) * 1.1 <= available // 2

    def test_limit_of_an_ancestor_counts(self, machine: Machine) -> None:
        machine.belongs_to("0::/app/web")
        machine.group("app/web", max="max", current=0, stat="inactive_file 0")
        machine.group("app", max=600 << 20, current=400 << 20, stat="anon 7\ninactive_file 0")
        assert 90 << 20 < machine.fit(GIB) <= 100 << 20

    def test_inactive_file_cache_is_as_good_as_free(self, machine: Machine) -> None:
        machine.group("", max=GIB, current=GIB, stat=f"inactive_file {GIB // 2}")
        assert GIB * 0.22 < machine.fit(GIB) <= GIB // 4

    def test_version_1(self, machine: Machine) -> None:
        machine.belongs_to("4:memory:/app", "2:cpu,cpuacct:/other", "0::/")
        machine.group("memory/app", limit_in_bytes=GIB, usage_in_bytes=GIB // 2, stat="total_inactive_file 0")
        machine.group("memory", limit_in_bytes=2**63 - 4096, usage_in_bytes=0, stat="total_inactive_file 0")
        assert GIB * 0.22 < machine.fit(GIB) <= GIB // 4

    def test_group_that_is_not_in_view(self, machine: Machine) -> None:
        machine.belongs_to("0::/../elsewhere")
        assert machine.fit(GIB) == GIB

    def test_too_little_memory(self, machine: Machine) -> None:
        machine.available(2 * MIN_SIZE)
        with pytest.raises(UnsupportedError, match="too little"):
            machine.fit(GIB)

    def test_too_little_wanted(self, machine: Machine) -> None:
        with pytest.raises(UsageError, match="1000 bytes"):
            machine.fit(1000)


class TestDatabase:
    def test_measurements_agree_and_are_ordered(self, database: workload.Database) -> None:
        seconds = 0.1
        short, longer = database.measure(0.0), database.measure(seconds)
        while longer["lookups"] == short["lookups"]:
            seconds *= 2
            longer = database.measure(seconds)
        assert short["checksum"] == longer["checksum"]
        assert short["lookups"] == workload.CHECKED_BATCHES * workload.LOOKUPS_PER_BATCH < longer["lookups"]
        assert 0 < longer["low"] <= longer["lookups_per_s"] <= longer["high"]
        assert longer["seconds"] >= seconds

    def test_verify_reads_the_same_twice(self, database: workload.Database) -> None:
        assert database.verify() == database.verify()
        assert database.verify()["intact"] is True

    @pytest.mark.parametrize(
        "damage",
        [
            "DELETE FROM document WHERE id = 1",
            "UPDATE document SET rank = rank + 1 WHERE id = 2",
            "UPDATE document SET body = zeroblob(length(body)) WHERE id = 3",
        ],
    )
    def test_verify_sees_a_change_of_one_document(self, database: workload.Database, damage: str) -> None:
        before = database.verify()
        copy = workload.Database()
        with closing(copy._db):
            database._db.backup(copy._db)
            assert copy.verify() == before
            assert copy._db.execute(damage).rowcount == 1
            assert copy.verify() != before

    def test_some_documents_are_gone_and_some_were_rewritten(self, database: workload.Database) -> None:
        rows = database.verify()["rows"]
        assert 0.97 < rows / database._documents < 1
        lengths = "SELECT count(*) FROM document WHERE length(body) = ?"
        (rewritten,) = database._db.execute(lengths, (workload.LONGEST_BODY,)).fetchone()
        assert 0.01 < rewritten / rows < 0.03


class TestAnswer:
    @pytest.mark.parametrize("line", ["", "{", "[]", "1", "{}", '{"cmd": "measure", "seconds": "soon"}'])
    def test_not_a_request(self, database: workload.Database, line: str) -> None:
        assert "not a request" in str(workload.answer(database, line)["error"])

    def test_unknown_command(self, database: workload.Database) -> None:
        assert "'dance'" in str(workload.answer(database, '{"cmd": "dance"}')["error"])

    def test_every_answer_is_json(self, database: workload.Database) -> None:
        for command in ("measure", "verify", "stats"):
            reply = workload.answer(database, json.dumps({"cmd": command, "seconds": 0}))
            assert json.loads(json.dumps(reply)) == reply
            assert "error" not in reply


def test_stats_agree_with_the_sum_the_kernel_makes() -> None:
    stats = workload.memory_stats()
    rollup = Path("/proc/self/smaps_rollup").read_text().split()
    resident = int(rollup[rollup.index("Rss:") + 1]) << 10
    assert abs(stats["rss_bytes"] - resident) < 4 << 20  # reading the one takes memory that the other then shows
    assert 0 <= stats["hole_bytes"] <= stats["heap_bytes"]


def test_heap_and_holes_of_a_known_map() -> None:
    size = workload.pmd_bytes() >> 10
    mapping = "{} {} 00000000 00:00 {} {}\nSize: {:>12} kB\nRss: {:>12} kB\nAnonymous: {:>8} kB\n"
    smaps = mapping.format("1000-2000", "rw-p", 0, "       [heap]", 4 * size, 3 * size, 3 * size)
    smaps += mapping.format("3000-4000", "rw-p", 77, "    /lib/libc.so.6", 5 * size, size, size) + "VmFlags: rd wr\n"
    smaps += mapping.format("5000-6000", "r--p", 0, "", 6 * size, 0, 0)
    found = [(is_heap, fields["Size"] >> 10, fields["Rss"] >> 10) for is_heap, fields in workload._mappings(smaps)]
    assert found == [(True, 4 * size, 3 * size), (False, 5 * size, size), (False, 6 * size, 0)]


class TestBadChild:
    """A workload that does not do as it should, played by a shell script in the interpreter's place."""

    @staticmethod
    def play(monkeypatch: pytest.MonkeyPatch, folder: Path, script: str) -> None:
        program = folder / "child"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(program))

    def test_fails_with_a_reason(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.play(monkeypatch, tmp_path, "echo no such library >&2; exit 3")
        with Workload() as child, pytest.raises(TargetVanishedError, match="exited with status 3") as caught:
            child.start(MIN_SIZE)
        assert caught.value.help == "no such library"

    def test_killed_without_a_word(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.play(monkeypatch, tmp_path, "kill -9 $$")
        with Workload() as child, pytest.raises(TargetVanishedError, match="Killed") as caught:
            child.start(MIN_SIZE)
        assert "memory" in caught.value.help

    def test_never_ready(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.play(monkeypatch, tmp_path, "exec sleep 10000")
        monkeypatch.setattr(client, "ANSWER_TIMEOUT", 0.2)
        with Workload() as child, pytest.raises(MthpError, match="has not answered"):
            child.start(MIN_SIZE)

    def test_not_there(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
        with Workload() as child, pytest.raises(MthpError, match="cannot be started"):
            child.start(MIN_SIZE)

    def test_refuses(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.play(monkeypatch, tmp_path, """echo '{"event": "ready"}'; read -r line; echo '{"error": "too early"}'""")
        with Workload() as child:
            child.start(MIN_SIZE)
            with pytest.raises(MthpError, match="too early"):
                child.verify()


def test_questions_before_the_start() -> None:
    with Workload() as child:
        with pytest.raises(UsageError, match="not running"):
            child.stats()
        with pytest.raises(UsageError, match="at least"):
            child.start(MIN_SIZE - 1)
