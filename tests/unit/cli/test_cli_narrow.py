"""What every command prints on a narrow terminal: every figure that a pipe gets, whole, and no line too long."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from fakes import FakeSpace, page_runs
from golden.loader import HERE
from mthp.cli import main, status_command
from mthp.cli.demo_command import print_story
from mthp.cli.doctor_command import print_examination
from mthp.cli.render.outcomes import print_report
from mthp.cli.render.output import console
from mthp.daemon.telemetry import WorkCounters
from mthp.demo.story import Chapter, Speed, Story
from mthp.engine.collapse import collapse_space
from mthp.engine.select import PlanOptions
from mthp.geometry import X86_64
from mthp.linux.doctor.findings import Examination, Finding, State
from mthp.metrics import Durations
from mthp.objects import to_object
from mthp.ptes import Pte
from mthp.vma import Vma

WIDTHS = pytest.mark.parametrize("width", [40, 80, 120])
EXAMPLE = str(Path(__file__).parents[2] / "example.parquet")
MB2 = 2 << 20
BASE = 1 << 40

SCENARIO = """
duration = "2s"
[machine]
memory = "64M"
[[process]]
workload = "service"
name = "a-service-of-a-name-that-is-much-too-long-for-any-table"
core = "4M"
burst = "2M"
every = "1s"
count = 2
"""

Print = Callable[[], object]


def check(print_it: Print, width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Print it for a pipe, and again for `width` columns."""
    monkeypatch.delenv("COLUMNS", raising=False)
    capsys.readouterr()
    print_it()
    wide = capsys.readouterr().out
    monkeypatch.setenv("COLUMNS", str(width))
    print_it()
    narrow = capsys.readouterr().out
    assert figures(wide), "it has figures to lose"
    assert not figures(wide) - figures(narrow)
    assert [line for line in narrow.splitlines() if cell_len(line) > width] == []


def figures(text: str) -> Counter[str]:
    """Return the words of `text` that have a digit, but for paths and long names, which may be shortened."""
    return Counter(word for word in re.findall(r"\S*[0-9]\S*", text) if "/" not in word and len(word) < 40)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with inputs of every command, which is the current one."""
    (tmp_path / "scenario.toml").write_text(SCENARIO)
    (tmp_path / "grid.toml").write_text('policies = ["rfc"]\n')
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "9.parquet").write_text("not a snapshot")
    with gzip.open(HERE / "linux-7.2.13-ppc64-64k-anon.jsonl.gz", "rt", encoding="utf-8") as lines:
        case = json.loads(next(lines))
    case["after"] = [["none", sum(count for _, count in case["before"])]]
    (tmp_path / "cases.jsonl").write_text(json.dumps(case))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@WIDTHS
@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", EXAMPLE, "--all"],
        ["plan", EXAMPLE, "--orders", "all", "--max-ptes-none", "64"],
        ["collapse", EXAMPLE, "--dry-run"],
        ["compare", EXAMPLE, "--max-ptes-none", "64,511", "--scans", "2"],
        ["simulate", "scenario.toml", "--policies", "mainline,pmd-only"],
        ["sweep", "in", "--grid", "grid.toml", "-o", "out.parquet", "--force"],
        ["conformance", "replay", "cases.jsonl"],
    ],
    ids=lambda arguments: arguments[0],
)
@pytest.mark.usefixtures("directory")
def test_commands_on_files(
    arguments: list[str], width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pyarrow")
    check(lambda: main(arguments), width, capsys, monkeypatch)


@pytest.mark.usefixtures("directory")
def test_a_terminal_that_has_no_ellipsis_gets_another_sign() -> None:
    pytest.importorskip("pyarrow")
    command = [sys.executable, "-m", "mthp", "simulate", "scenario.toml"]
    environment = os.environ | {"COLUMNS": "60", "PYTHONIOENCODING": "latin-1"}
    done = subprocess.run(command, env=environment, capture_output=True, encoding="latin-1", check=True)
    assert re.search(r"a-servi\S*\?\S*-table-2 ", done.stdout), done.stdout


def space() -> FakeSpace:
    runs = [(512, Pte.PRESENT, 0), (64, Pte.PRESENT, 0), (448, 0, -1)]
    return FakeSpace([(Vma(BASE, BASE + 2 * MB2, "rw-p", "[heap]"), *page_runs(*runs))], label="4711 (server)")


@WIDTHS
def test_collapse(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    report = collapse_space(space(), PlanOptions(max_ptes_none=0))
    check(lambda: print_report(console(), report, 0.99), width, capsys, monkeypatch)


@WIDTHS
def test_demo(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    waits, speed = Durations(9, 2.5e-6, 0.00125, 0.0175, 1.0), Speed(1234567.0, 1134567.0, 1334567.0)
    chapters = [
        Chapter("before", 0.0, 391 << 20, 0, 0.0, waits, speed),
        Chapter("mTHPs", 0.987, 391 << 20, 5 << 20, 4.25, waits, speed, 1.08),
        Chapter("huge pages", 1.0, 534 << 20, 143 << 20, 0.33, waits, speed, 1.33),
        Chapter("trimmed", 0.75, 401 << 20, 10 << 20, 0.07, None, speed, 1.22),
    ]
    story = Story("4711 (server) and 4712 (server)", "6.18.44", X86_64, 4, {9: "madvise", 4: "move"}, "no debugfs")
    story.chapters, story.undone = chapters, ["99 things could not be done"]
    check(lambda: print_story(console(), story), width, capsys, monkeypatch)
    assert "not on the PATH" not in capsys.readouterr().out
    # As after `make demo`, whose last lines name commands to type.
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sys, "argv", [".venv/bin/mthp"])
    print_story(console(), story)
    assert " ".join(capsys.readouterr().out.split()).endswith("mthp is not on the PATH: it is .venv/bin/mthp")


@WIDTHS
def test_doctor(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    findings = (
        Finding("move_machine", "the mover, for folios below the PMD size", State.OK, "there is code for x86_64", ""),
        Finding(
            "khugepaged", "the kernel's", State.LIMITED, "640 s of rest in 64 passes of 4096 pages", "lower it to 10"
        ),
    )
    examination = Examination("6.18.44", X86_64, has_thp=True, findings=findings)
    check(lambda: print_examination(console(), examination), width, capsys, monkeypatch)


@WIDTHS
def test_status(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    counters = to_object(WorkCounters(), X86_64)
    target: dict[str, Any] = {
        "pid": 4194303,
        "comm": "redis-server",
        "rule": "everything in the service slice",
        "policy": "no-creep",
        "left_out": None,
        "working": False,
        "next_look_seconds": 12.5,
        "bloat_left_bytes": None,
        "reasons": {"64 pages are shared with other processes": 3},
        "eagerness_level": 3.25,
    }
    status = {
        "pid": 4711,
        "uptime_seconds": 86400.0,
        "paused": False,
        "busy": False,
        "resting": False,
        "cpu_seconds": 864.25,
        "cpu": 0.1,
        "resident_memory_bytes": 64 << 20,
        "finds_processes_by": "netlink",
        "orders_refused": ["64K"],
        "left_out": {"kernel threads": 77},
        "counters": counters,
        "targets": [target | counters],
    }
    monkeypatch.setattr(status_command, "ask_daemon", lambda *_: status)
    check(lambda: main(["status"]), width, capsys, monkeypatch)
    monkeypatch.setenv("COLUMNS", "300")
    main(["status"])
    assert "eagerness 3.2; next look" in capsys.readouterr().out
