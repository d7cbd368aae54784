"""``mthp conformance replay`` and the reading of golden files: totals, exit codes, and files that are none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mthp.cli.conformance_command import command
from mthp.errors import UsageError
from mthp.sim.conformance import read_cases, replay, replay_case

CASE: dict[str, Any] = {
    "id": "one",
    "trigger": "khugepaged",
    "geometry": "ppc64-64k",
    "orders_enabled": [2],
    "max_ptes_none": 0,
    "max_ptes_swap": 4,
    "max_ptes_shared": 16,
    "before": [["anon", 7], ["none", 25]],
    "after": [[2, 4], [0, 3], ["none", 25]],
}
OTHER = CASE | {"id": "other", "after": [[0, 7], ["none", 25]]}


def written(path: Path, *cases: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(case) + "\n" for case in cases))
    return path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, ["replay", *arguments])


def test_totals_come_last(tmp_path: Path) -> None:
    done = run(str(written(tmp_path / "good.jsonl", CASE, CASE)))
    assert done.exit_code == 0
    assert done.stdout.splitlines() == ["cases 2, match 2, mismatch 0"]


def test_a_mismatch_is_shown_and_exits_1(tmp_path: Path) -> None:
    good, bad = written(tmp_path / "good.jsonl", CASE), written(tmp_path / "bad.jsonl", OTHER)
    done = run(str(good), str(bad))
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "case other"
    assert "pass 1: orders" in lines[1]
    assert lines[-1] == "cases 2, match 1, mismatch 1"


def test_json_is_one_object(tmp_path: Path) -> None:
    done = run("--json", str(written(tmp_path / "both.jsonl", CASE, OTHER)))
    assert done.exit_code == 1
    result = json.loads(done.stdout)
    assert result["schema"] == "mthp.conformance/1"
    assert (result["cases"], result["match"], result["mismatch"]) == (2, 1, 1)
    assert [case["case"] for case in result["mismatches"]] == ["other"]


def test_gzip_is_read(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(CASE).encode()))
    assert replay(read_cases(path)).matches == 1


@pytest.mark.parametrize(
    "content", [b"no json\n", b"[1]\n", b'{"id": 1}\n', b"\xff\xfe", json.dumps(CASE).encode()[:-9]]
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"cases\.jsonl"):
        list(read_cases(path))


@pytest.mark.parametrize("damage", ["cut", "no gzip"])
def test_a_damaged_gzip_file_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "cases.jsonl.gz"
    whole = gzip.compress(json.dumps(CASE).encode())
    path.write_bytes(whole[:-12] if damage == "cut" else b"plain text")
    with pytest.raises(UsageError, match=r"cases\.jsonl\.gz"):
        list(read_cases(path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("geometry", "vax"),
        ("before", [["anon", 7]]),
        ("before", [["anonymous", 32]]),
        ("before", [["large:9", 32]]),
        ("before", 5),
        ("max_ptes_none", 32),
        ("vma", ["hugetlb"]),
    ],
)
def test_a_case_that_cannot_be_is_refused(key: str, value: object) -> None:
    with pytest.raises(UsageError, match="case one"):
        replay_case(CASE | {key: value})


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="missing"):
        list(read_cases(tmp_path / "missing.jsonl"))
