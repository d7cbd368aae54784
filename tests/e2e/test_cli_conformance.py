"""``mthp conformance replay``: the totals at the end, the exit code, and files without cases."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from e2e.helpers import mthp, mthp_here, mthp_json
from golden.loader import HERE

FILE = HERE / "linux-7.2.13-ppc64-64k-anon.jsonl.gz"


def cases(count: int) -> list[dict[str, Any]]:
    with gzip.open(FILE, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]


def written(path: Path, some: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(case) + "\n" for case in some))
    return path


def test_cases_that_agree(tmp_path: Path) -> None:
    done = mthp("conformance", "replay", written(tmp_path / "some.jsonl", cases(20)))
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "cases 20, match 20, mismatch 0")


def test_a_case_that_does_not_agree_is_shown_and_counted(tmp_path: Path) -> None:
    some = cases(5)
    some[3]["after"] = [["none", sum(count for _, count in some[3]["before"])]]
    file = written(tmp_path / "some.jsonl", some)
    done = mthp("conformance", "replay", file)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "cases 5, match 4, mismatch 1")
    assert some[3]["id"] in done.stdout
    data = mthp_json("conformance", "replay", file, code=1)
    assert (data["cases"], len(data["mismatches"])) == (5, 1)


@pytest.mark.parametrize("name", ["missing", "text", "cut.jsonl.gz", "other.jsonl"])
def test_files_that_are_no_cases(tmp_path: Path, name: str) -> None:
    (tmp_path / "text").write_text("no JSON\n")
    (tmp_path / "cut.jsonl.gz").write_bytes(FILE.read_bytes()[:3000])
    (tmp_path / "other.jsonl").write_text('{"id": "x"}\n')
    done = mthp_here("conformance", "replay", tmp_path / name)
    assert done.returncode == 2
    assert name in done.stderr
    assert not done.stdout
