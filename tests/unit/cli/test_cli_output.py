"""How commands read their options and print: whole, plain when piped, without anything that acts on a terminal."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from typing import Any

import pytest

from fakes import FakeSpace, page_runs
from mthp import targets
from mthp.cli import plan_command
from mthp.cli.inspect_command import TOP_MAPPINGS, print_census
from mthp.cli.options import made_of
from mthp.cli.render.outcomes import print_report
from mthp.cli.render.output import PLAIN_WIDTH, console, note, print_json, progress_bar, say
from mthp.cli.render.planned import print_plan
from mthp.cli.render.tables import Table
from mthp.cli.signals import stopping_on_signals
from mthp.engine.census import take_census
from mthp.engine.collapse import collapse_space
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.geometry import X86_64
from mthp.means import Means
from mthp.objects import to_object
from mthp.ptes import ORDER_NONE, ORDER_UNKNOWN, Pte
from mthp.text import clean
from mthp.units import percent
from mthp.vma import Vma, VmaKind

BASE = 1 << 40
PMD = 2 << 20
EVIL = "evil\x1b[31m\x07\r\n\x9b2J\u202e[bold]:bomb:"
CONTROLS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]")
"""Everything that acts on a terminal, but the newline."""


def evil_space() -> FakeSpace:
    """Return a process with only hostile names."""
    anon = Vma(BASE, BASE + 2 * PMD, "rw-p", EVIL)
    file = Vma(BASE + 4 * PMD, BASE + 4 * PMD + 8192, "r--p", f"/tmp/{EVIL}", VmaKind.FILE)
    return FakeSpace(
        [
            (anon, *page_runs((512, Pte.PRESENT, 0), (64, Pte.PRESENT, 0), (448, 0, ORDER_NONE))),
            (file, *page_runs((1, Pte.PRESENT | Pte.FILE, 0), (1, Pte.PRESENT | Pte.FILE, ORDER_UNKNOWN))),
        ],
        label=f"4711 ({EVIL})",
        kernel=EVIL,
        missing=(f"all of {EVIL}",),
    )


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def print_everything() -> None:
    out = console()
    print_census(out, take_census(evil_space()), show_all=True)
    plan = plan_space(evil_space(), PlanOptions(max_ptes_none=0))
    print_plan(out, plan)
    note(out, evil_space().missing)
    print_report(out, collapse_space(evil_space(), PlanOptions(max_ptes_none=0)), 0.99)


def test_control_characters_of_names_do_not_reach_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    print_everything()
    text = printed(capsys)
    assert not CONTROLS.search(text)
    assert text.count("evil�[31m") >= 6
    # Markup and names of emoji are plain text.
    assert "[bold]:bomb:" in text


def test_nor_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    print_everything()
    text = terminal.getvalue()
    assert "\x1b[" in text, "a terminal gets styles"
    assert not CONTROLS.search(re.sub(r"\x1b\[[0-9;]*m", "", text))
    assert "\x1b[31m" not in text


@pytest.mark.parametrize("text", ["plain", "ünïcödé 漢字", "a b", ""])
def test_clean_leaves_text_alone(text: str) -> None:
    assert clean(text) == text


def test_clean_replaces_what_is_not_text() -> None:
    assert clean("a\x1b\n\x00\x7f\udcffb") == "a�����b"


def test_a_pipe_gets_long_names_whole(capsys: pytest.CaptureFixture[str]) -> None:
    path = "/very" + "/long" * 1000
    out = console()
    out.print(Table("title", ["a", "name"], [["1", path], ["2", "short"]]))
    note(out, [path])
    say(out, path)
    lines = printed(capsys).splitlines()
    assert sum(path in line for line in lines) == 3


def test_a_table_lines_up(capsys: pytest.CaptureFixture[str]) -> None:
    console().print(Table("sizes", ["size", "bytes", "name"], [["4K", "1", "x"], ["2M", "1000", "y"]], right={1}))
    lines = [line.rstrip() for line in printed(capsys).splitlines()]
    assert lines == ["", "sizes", "size  bytes  name", "4K        1  x", "2M     1000  y"]


@pytest.mark.parametrize(("columns", "width"), [("60", 60), ("10", 40), ("0", PLAIN_WIDTH), ("wide", PLAIN_WIDTH)])
def test_columns_sets_the_width_of_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    out = console()
    assert out.width == width
    out.print(Table("title", ["figure", "text"], [["13.7G", "several words " * 20]], right={0}))
    note(out, ["several words " * 20])
    say(out, "several words " * 20)
    assert all(len(line) <= width for line in printed(capsys).splitlines())


def test_json_is_one_object_with_its_schema_first(capsys: pytest.CaptureFixture[str]) -> None:
    print_json("plan", {"a": 1, "name": EVIL})
    text = printed(capsys)
    assert json.loads(text) == {"schema": "mthp.plan/1", "a": 1, "name": EVIL}
    assert next(iter(json.loads(text))) == "schema"
    assert not CONTROLS.search(text)


def test_json_of_everything_can_be_written() -> None:
    report = collapse_space(evil_space(), PlanOptions(max_ptes_none=0), Means(max_bloat=0))
    for data in map(to_object, (take_census(evil_space()), report.plan, report)):
        assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_json_of_a_census_counts_bytes() -> None:
    census = take_census(evil_space())
    data = to_object(census)
    assert data["total"]["resident_bytes"] == 578 * 4096
    assert data["total"]["pages_by_order"] == {"0": 577}
    assert data["total"]["pages_of_unknown_order"] == 1
    assert data["anonymous"]["resident_bytes"] == 576 * 4096
    first, second = data["vmas"]
    assert [first["start"], second["start"]] == [hex(BASE), hex(BASE + 4 * PMD)]
    assert first["madvise"]["sizes"][-1] == "2M"
    assert second["khugepaged"] == {"sizes": [], "reason": "smaller than 2M"}


def test_json_with_rows_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    cases: list[list[dict[str, Any]]] = [[], [{"a": 1}], [{"a": 1}, {"b": "\u2028"}]]
    for rows in cases:
        print_json("inspect", {"x": [1, 2], "y": {"z": [1]}, "vmas": iter(rows)})
        assert json.loads(capsys.readouterr().out) == {
            "schema": "mthp.inspect/1",
            "x": [1, 2],
            "y": {"z": [1]},
            "vmas": rows,
        }


def test_json_of_a_report_adds_up() -> None:
    report = collapse_space(evil_space(), PlanOptions(max_ptes_none=0), Means(mechanism="madvise"))
    data = to_object(report)
    assert (data["collapsed_ranges"], data["collapsed_bytes"]) == (1, PMD)
    assert data["needs_move_folios"] == {"6": 1}
    assert data["mechanism_by_order"] == {"9": "madvise", "6": None}
    assert data["plan"]["folios_by_order"] == {"9": 1, "6": 1}
    assert data["coverage"] == 512 / 576
    assert not data["complete"]


def test_the_largest_mappings_are_shown_unless_all_are_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    count = TOP_MAPPINGS + 5
    mappings = [
        (
            Vma(BASE + i * PMD, BASE + i * PMD + 64 * 4096, "rw-p", f"number-{i:02}"),
            *page_runs((i, 1, 0), (64 - i, 0, -1)),
        )
        for i in range(count)
    ]
    census = take_census(FakeSpace(mappings))
    print_census(console(), census)
    names = re.findall(r"number-\d\d", printed(capsys))
    assert names == [f"number-{i:02}" for i in range(count - 1, 4, -1)]
    print_census(console(), census, show_all=True)
    assert re.findall(r"number-\d\d", printed(capsys)) == [f"number-{i:02}" for i in range(count)]


def test_a_process_without_memory_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    space = FakeSpace([])
    print_census(console(), take_census(space))
    print_plan(console(), plan_space(space, PlanOptions()))
    print_report(console(), collapse_space(space, PlanOptions()))
    assert "sizes none" in printed(capsys)


def test_a_dry_run_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(console(), collapse_space(evil_space(), PlanOptions(), dry_run=True))
    assert "nothing was changed" in printed(capsys)


def test_progress_is_for_terminals(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("reading") as progress:
        progress(1, 2)
        progress(0, 0)
    assert printed(capsys) == ""


def test_options_of_a_plan_are_picked_out() -> None:
    options: dict[str, Any] = {"policy": "rfc", "orders": "2M", "include_file": True, "rate": 5}
    assert made_of(PlanOptions, options) == PlanOptions(policy="rfc", orders="2M", include_file=True)


def test_figures() -> None:
    assert percent(0.1234) == "12.3%"
    assert percent(1) == "100.0%"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_a_wish_and_the_second_acts(number: signal.Signals) -> None:
    came: list[int] = []
    before = signal.signal(number, lambda got, _frame: came.append(got))
    try:
        with stopping_on_signals() as stop:
            assert not stop()
            os.kill(os.getpid(), number)
            assert stop()
            assert came == []
            os.kill(os.getpid(), number)
            assert came == [number]
        os.kill(os.getpid(), number)
        assert came == [number, number]
    finally:
        signal.signal(number, before)


def test_a_plan_says_beforehand_what_the_mover_would_refuse(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Guarded(FakeSpace):
        def move_refusals(self, means: Means) -> list[str]:
            assert means.mechanism == "move"
            return ["a seccomp filter guards it"]

    vma = Vma(1 << 40, (1 << 40) + X86_64.pmd_size, "rw-p")
    for orders, there in (("64K", True), ("2M", False)):
        space = Guarded([(vma, *page_runs((512, Pte.PRESENT, 0)))])
        monkeypatch.setattr(targets, "open_target", lambda target, at=None, space=space: space)
        plan_command.command.main(["7", "--orders", orders], standalone_mode=False)
        assert ("would not begin: a seccomp filter guards it" in capsys.readouterr().out) == there
