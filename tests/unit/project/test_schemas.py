"""The schema of every command's JSON, and the output of the commands against it."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import click
import pytest

from fakes import FakeSpace, page_runs
from golden.loader import HERE
from mthp.cli import COMMANDS, main
from mthp.cli.schema_command import OBJECTS, schema
from mthp.engine.collapse import collapse_space
from mthp.engine.select import PlanOptions
from mthp.means import Means
from mthp.objects import schema_of, to_object
from mthp.ptes import Pte
from mthp.vma import Vma
from schemas import check

BASE = 0x7F00_0000_0000
HOLES = ((600, Pte.PRESENT, 0), (100, 0, -1), (324, Pte.PRESENT, 0))

SCENARIO = 'duration = "1s"\n[machine]\nmemory = "64M"\n[[process]]\nworkload = "redis"\nmemory = "8M"\n'

RUNS: dict[str, list[str]] = {
    "doctor": ["doctor"],
    "inspect": ["inspect", "one.parquet"],
    "inspect of itself": ["inspect", "self", "--zero-filled", "--numa"],
    "inspect of several": ["inspect", "one.parquet", "self", "unit:mthp-test-none", "4194304"],
    "plan": ["plan", "one.parquet"],
    "plan of several": ["plan", "one.parquet", "snapshots/one.parquet", "grid.toml"],
    "plan with limits": ["plan", "one.parquet", "--orders", "64K", "--max-ptes-none", "0"],
    "collapse": ["collapse", "self", "--dry-run", "--min-coverage", "10%"],
    "collapse of several": ["collapse", "self", "unit:mthp-test-none", "--dry-run"],
    "trim of several": ["trim", "self", "unit:mthp-test-none", "--dry-run"],
    "record of several": ["record", "self", "4194304", "--for", "10ms", "-o", "several"],
    "explain": ["explain", "one.parquet", "7f0000000000"],
    "explain of all": ["explain", "one.parquet"],
    "verify": ["verify", "one.parquet", "--expect", "2M>=0%", "--expect", "stack:64K>=1%"],
    "verify of several": ["verify", "one.parquet", "grid.toml", "--expect", "2M>=0%"],
    "snapshot": ["snapshot", "self", "-o", "out"],
    "record": ["record", "self", "--for", "10ms", "-o", "out"],
    "record of a trace": ["record", "--from-trace", "trace", "-o", "out"],
    "compare": ["compare", "one.parquet", "--scans", "2"],
    "sweep": ["sweep", "snapshots", "--grid", "grid.toml", "--jobs", "1", "-o", "out"],
    "simulate": ["simulate", "scenario.toml"],
    "report": ["report", "one.parquet", "-o", "out"],
    "conformance": ["conformance", "replay", "cases.jsonl"],
}


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    snapshot = pytest.importorskip("mthp.snapshot")
    pytest.importorskip("jinja2")
    pytest.importorskip("joblib")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snapshots").mkdir()
    for path in ("one.parquet", "snapshots/one.parquet"):
        snapshot.record(holed(), tmp_path / path)
    (tmp_path / "trace").write_text(" L 04222ff8,16\n S 04425010,8\n")
    (tmp_path / "grid.toml").write_text('policies = ["mainline"]')
    (tmp_path / "scenario.toml").write_text(SCENARIO)
    with gzip.open(next(HERE.glob("linux-*.jsonl.gz")), "rt") as lines:
        some = [json.loads(next(lines)) for _ in range(3)]
    some[0]["after"] = [["none", sum(count for _, count in some[0]["before"])]]
    (tmp_path / "cases.jsonl").write_text("".join(json.dumps(case) + "\n" for case in some))
    return tmp_path


def holed(orders: Iterable[int] | None = None) -> FakeSpace:
    vma = Vma(BASE, BASE + (4 << 20), "rw-p", "[heap]")
    return FakeSpace([(vma, *page_runs(*HOLES))], orders=orders, missing=("page frames",))


def printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main([*arguments, "--json"])
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert answer.keys() != {"schema", "error"}
    return answer


@pytest.mark.parametrize("name", RUNS)
def test_what_a_command_prints_is_as_its_schema_says(
    name: str, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check(RUNS[name][0], printed(RUNS[name], capsys))


@pytest.mark.parametrize("mechanism", ["madvise", "move"])
def test_a_collapse_is_as_its_schema_says(mechanism: Any) -> None:
    wanted: dict[str, Any] = {"move_refusals": [], "min_coverage": None, "min_coverage_reached": True}
    report = collapse_space(holed(range(2, 10)), PlanOptions(max_ptes_none=0), Means(mechanism=mechanism))
    assert report.folios or report.needs_move
    check("collapse", {"schema": "mthp.collapse/1"} | to_object(report) | wanted)


@pytest.mark.parametrize("name", OBJECTS)
def test_a_key_more_or_less_is_found(name: str) -> None:
    properties = schema(name)["anyOf"][0]["properties"]
    with pytest.raises(AssertionError):
        check(name, {"schema": f"mthp.{name}/1"})
    assert "unknown" not in properties
    with pytest.raises(AssertionError):
        check(name, {"schema": f"mthp.{name}/1", "error": {"message": "m", "help": "", "exit_code": 1}, "unknown": 1})


@pytest.mark.parametrize("name", OBJECTS)
def test_an_error_is_as_the_schema_says(name: str) -> None:
    check(name, {"schema": f"mthp.{name}/1", "error": {"message": "m", "help": "", "exit_code": 1}})


def test_every_command_that_prints_json_has_a_schema() -> None:
    from mthp.cli import _mthp

    with click.Context(_mthp) as context:
        commands = {name: _mthp.get_command(context, name) for name in COMMANDS}
    assert {name for name, command in commands.items() if command and _prints_json(command)} == OBJECTS.keys()


def _prints_json(command: click.Command) -> bool:
    parts = command.commands.values() if isinstance(command, click.Group) else [command]
    return any("--json" in parameter.opts for part in parts for parameter in part.params)


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "plan"]) == 0
    assert json.loads(capsys.readouterr().out) == schema("plan")


def test_an_attribute_that_does_not_exist_or_has_no_type_has_no_schema() -> None:
    @dataclasses.dataclass
    class Result:
        JSON: ClassVar = "missing"

        def untyped(self):  # type: ignore[no-untyped-def]
            return 1

    with pytest.raises(TypeError, match="Result has no attribute 'missing'"):
        schema_of("x", (Result,))
    Result.JSON = "untyped"
    with pytest.raises((KeyError, TypeError)):
        schema_of("x", (Result,))
