"""The demo's workload without its process: its computation, answers, size and failures."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from mthp.budget import MemoryBound
from mthp.demo import workload
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


class TestFitSize:
    def test_what_is_wanted_where_there_is_plenty(self) -> None:
        assert fit_size(GIB, [MemoryBound("the machine", 64 * GIB, 60 * GIB)], 2) == GIB
        assert fit_size(GIB, [], 2) == GIB

    @pytest.mark.parametrize("workloads", [1, 2])
    def test_collapsed_to_huge_pages_they_stay_within_half_of_the_least_that_is_left(self, workloads: int) -> None:
        bounds = [MemoryBound("the machine", 64 * GIB, 60 * GIB), MemoryBound("/a", 2 * GIB, GIB)]
        assert GIB * 0.45 < fit_size(GIB, bounds, workloads) * 1.5 * workloads <= GIB // 2

    def test_too_little_memory(self) -> None:
        with pytest.raises(UnsupportedError, match="too little"):
            fit_size(GIB, [MemoryBound("/a", GIB, 2 * MIN_SIZE)], 2)

    def test_too_little_wanted(self) -> None:
        with pytest.raises(UsageError, match="1000 bytes"):
            fit_size(1000, [], 2)


class TestServe:
    def test_what_was_looked_up_is_counted_in_order(self, database: workload.Database) -> None:
        ends = iter([False] * 500 + [True])
        served = database.serve(lambda: next(ends))
        assert served["count"] == 500
        assert 0 < served["p50"] <= served["p99"] <= 1.07 * served["max"]
        assert served["max"] <= served["total"]

    def test_nothing_looked_up_is_nothing(self, database: workload.Database) -> None:
        assert database.serve(lambda: True) == {"count": 0, "p50": 0.0, "p99": 0.0, "max": 0.0, "total": 0.0}

    @pytest.mark.parametrize("nanoseconds", [1, 15, 16, 31, 32, 1000, 123_456, 10**9, 10**12])
    def test_a_duration_is_counted_to_within_a_sixteenth(self, nanoseconds: int) -> None:
        counts = [0] * 64 * workload.BUCKETS_PER_DOUBLING
        counts[workload._bucket(nanoseconds)] = 1
        assert nanoseconds <= round(workload._percentile(counts, 0.5) * 1e9) <= nanoseconds * 17 // 16 + 1

    def test_percentiles_are_by_rank(self) -> None:
        counts = [0] * 64 * workload.BUCKETS_PER_DOUBLING
        counts[workload._bucket(16)], counts[workload._bucket(1000)] = 98, 2
        assert workload._percentile(counts, 0.5) == 17e-9
        assert workload._percentile(counts, 0.99) > 1e-6


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
        for command in ("measure", "verify"):
            reply = workload.answer(database, json.dumps({"cmd": command, "seconds": 0}))
            assert json.loads(json.dumps(reply)) == reply
            assert "error" not in reply


class TestBadChild:
    """A workload that does not do as it should, played by a shell script in the interpreter's place."""

    @staticmethod
    def play(folder: Path, script: str) -> str:
        program = folder / "child"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return str(program)

    def test_fails_with_a_reason(self, tmp_path: Path) -> None:
        program = self.play(tmp_path, "echo no such library >&2; exit 3")
        with Workload(program) as child, pytest.raises(TargetVanishedError, match="exited with status 3") as caught:
            child.start(MIN_SIZE)
        assert caught.value.help == "no such library"

    def test_killed_without_a_word(self, tmp_path: Path) -> None:
        program = self.play(tmp_path, "kill -9 $$")
        with Workload(program) as child, pytest.raises(TargetVanishedError, match="Killed") as caught:
            child.start(MIN_SIZE)
        assert "memory" in caught.value.help

    def test_never_ready(self, tmp_path: Path) -> None:
        program = self.play(tmp_path, "exec sleep 10000")
        with Workload(program, timeout=0.2) as child, pytest.raises(MthpError, match="has not answered"):
            child.start(MIN_SIZE)

    def test_not_there(self, tmp_path: Path) -> None:
        with Workload(str(tmp_path / "nothing")) as child, pytest.raises(MthpError, match="cannot be started"):
            child.start(MIN_SIZE)

    def test_refuses(self, tmp_path: Path) -> None:
        program = self.play(tmp_path, """echo '{"event": "ready"}'; read -r line; echo '{"error": "too early"}'""")
        with Workload(program) as child:
            child.start(MIN_SIZE)
            with pytest.raises(MthpError, match="too early"):
                child.verify()


def test_questions_before_the_start() -> None:
    with Workload() as child:
        with pytest.raises(UsageError, match="not running"):
            child.verify()
        with pytest.raises(UsageError, match="at least"):
            child.start(MIN_SIZE - 1)
