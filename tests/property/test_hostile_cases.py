"""Altered golden cases: replayed, or refused with the name of the case."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostile import altered, bomb, damaged, refuses
from mthp.errors import UsageError
from mthp.sim.golden.cases import CASE_BYTES, case_lines, parse_case
from mthp.sim.golden.conformance import replay_case
from strategies import examples

GOLDEN = Path(__file__).parents[1] / "golden" / "linux-7.2.13-ppc64-64k-corners.jsonl.gz"
LINES = gzip.decompress(GOLDEN.read_bytes()).splitlines()[:20]
EXAMPLES = settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture])


def replayed(path: Path) -> None:
    try:
        for line in case_lines(path):
            replay_case(parse_case(line))
    except UsageError as error:
        refuses(error)


@EXAMPLES
@given(st.data())
def test_a_case_that_was_altered(tmp_path: Path, data: st.DataObject) -> None:
    case: Any = json.loads(data.draw(st.sampled_from(LINES)))
    (tmp_path / "cases").write_text(json.dumps(data.draw(altered(case))))
    replayed(tmp_path / "cases")


@pytest.mark.parametrize("name", ["moved", "flags"])
def test_a_run_that_is_longer_than_the_range(name: str) -> None:
    case: Any = next(case for case in map(json.loads, LINES) if case["passes"][0].get(name))
    case["passes"][0][name][0][1] = 1 << 40
    with pytest.raises(UsageError, match=f"{name} has .* entries, a PMD range has"):
        replay_case(parse_case(json.dumps(case).encode()))


@EXAMPLES
@given(st.data())
def test_bytes_of_cases(tmp_path: Path, data: st.DataObject) -> None:
    text = b"\n".join(LINES[:2])
    (tmp_path / "cases").write_bytes(data.draw(damaged(text)))
    replayed(tmp_path / "cases")
    (tmp_path / "cases.gz").write_bytes(data.draw(damaged(gzip.compress(text, mtime=0))))
    replayed(tmp_path / "cases.gz")


BOMBS = {"line": b" " * (64 << 20), "lines": b"\n" * (4 << 20), "deep": LINES[0] + b"\n" + b"[" * 5000}


@pytest.mark.slow
@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_file_that_inflates(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "cases.jsonl.gz"
    path.write_bytes(gzip.compress(text, 1))
    said = bomb(path, "conformance", "replay", path)
    assert "cannot be replayed: line" in said


def test_the_bound_is_above_what_was_recorded() -> None:
    for path in GOLDEN.parent.glob("*.gz"):
        with gzip.open(path) as file:
            assert max(map(len, file)) < CASE_BYTES.most // 4
