"""``mthp report`` through the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.helpers import Actor, mthp, mthp_here, mthp_json
from mthp.snapshot import record
from report_spaces import redis_like

pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "before.parquet"
    record(redis_like(), path)
    return path


def test_a_snapshot_becomes_a_page(snapshot: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    answer = mthp_json("report", snapshot, "-o", out, "--max-ptes-none", 64)
    assert answer == {
        "schema": "mthp.report/1",
        "target": "4711 (redis-server)",
        "path": str(out),
        "bytes": out.stat().st_size,
    }
    text = out.read_text("utf-8")
    assert f"mthp report {snapshot} -o {out} --max-ptes-none 64 --json" in text
    assert "max_ptes_none 64" in text


@pytest.mark.slow
def test_a_comparison_becomes_a_page(snapshot: Path, tmp_path: Path) -> None:
    result, out = tmp_path / "compare.json", tmp_path / "out.html"
    done = mthp("compare", snapshot, "--max-ptes-none", "64,511", "--scans", "all", "--json")
    result.write_text(done.stdout)
    assert mthp("report", result, "-o", out).returncode == 0
    text = out.read_text("utf-8")
    for wanted in ("4711 (redis-server)", "Coverage against bloat", "Creep", "no-creep max_ptes_none=64"):
        assert wanted in text
    result.write_text(done.stdout[:-40])
    cut = mthp("report", result, "-o", out, "--force")
    assert (cut.returncode, "cut short" in cut.stderr) == (2, True)
    result.write_text(done.stdout.replace('"rows"', '"sows"'))
    damaged = mthp("report", result, "-o", out, "--force")
    assert (damaged.returncode, "damaged" in damaged.stderr) == (2, True)
    result.write_text('{"schema": "mthp.inspect/1"}')
    other = mthp("report", result, "-o", out, "--force")
    assert (other.returncode, "not of `mthp compare`" in other.stderr) == (2, True)


def test_two_snapshots_are_set_side_by_side(snapshot: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    assert mthp("report", snapshot, "--after", snapshot, "-o", out).returncode == 0
    assert "afterwards" in out.read_text("utf-8")


@pytest.mark.usefixtures("thp_switches")
def test_a_live_process_for_a_quick_look(actor: Actor, tmp_path: Path) -> None:
    actor.fill(actor.map(8 << 20), 512)
    out = tmp_path / "out.html"
    done = mthp("report", actor.pid, "-o", out)
    assert done.returncode == 0, done.stderr
    text = out.read_text("utf-8")
    assert f"mthp collapse {actor.pid} --max-bloat 5%" in text
    assert "helpers.serve" not in text, "arguments are shown without --with-arguments"
    assert mthp("report", actor.pid, "-o", out, "--force", "--with-arguments").returncode == 0
    assert "helpers.serve" in out.read_text("utf-8")


def test_a_recording_becomes_a_page_and_is_shown_over_time(actor: Actor, tmp_path: Path) -> None:
    actor.fill(actor.map(8 << 20), 512)
    recording, out = tmp_path / "rec.mthp", tmp_path / "out.html"
    assert mthp("record", actor.pid, "--every", "50ms", "--for", "300ms", "-o", recording).returncode == 0
    assert mthp("report", recording, "-o", out).returncode == 0
    text = out.read_text("utf-8")
    assert "Coverage over time" in text
    assert "At the beginning and at the end" in text
    assert mthp("report", recording, "--at", 0, "-o", out, "--force").returncode == 0
    assert "step 0 of a recording" in out.read_text("utf-8")
    assert mthp("report", recording, "--at", 999, "-o", out, "--force").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["report", "nowhere.parquet", "-o", "{out}"], "neither a PID"),
        (["report", "{snapshot}", "-o", "{dir}/nowhere/out.html"], "does not exist"),
        (["report", "{snapshot}", "-o", "{out}", "--with-arguments"], "needs a PID"),
        (["report", "{snapshot}", "-o", "{out}", "--after", "self"], "takes a snapshot"),
        (["report", "{snapshot}", "-o", "{out}", "--policy", "best"], "best"),
        (["report", "{text}", "-o", "{out}"], "not a snapshot"),
    ],
)
def test_errors_say_what_is_wrong_and_leave_nothing(
    arguments: list[str], words: str, snapshot: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.parquet"
    text.write_text("no parquet")
    values = {"out": tmp_path / "out.html", "snapshot": snapshot, "dir": tmp_path, "text": text}
    done = mthp_here(*(word.format(**values) for word in arguments))
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == [text]
