"""Scenarios that are too long or too large: a message states their cost first, and Ctrl-C keeps the rows so far."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from e2e.helpers import MTHP, mthp
from hostile import bomb
from mthp.cli.render.forecast import Forecast, about

pytest.importorskip("pyarrow")

SMALL = '[machine]\nmemory = "64M"\n[[process]]\nworkload = "service"\ncore = "2M"\nburst = "2M"\n'


@pytest.mark.slow
@pytest.mark.parametrize("extra", ["", "[tunables]\nscan_sleep_millisecs = 0\n"], ids=["days", "busy"])
def test_a_long_simulation_says_so_and_ends_on_ctrl_c(tmp_path: Path, extra: str) -> None:
    path, output = tmp_path / "long.toml", tmp_path / "rows"
    path.write_text(f"duration = 99999\n{SMALL}{extra}")
    command = [*MTHP, "simulate", str(path), "-o", str(output), "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stderr is not None
        line = running.stderr.readline()
        assert "takes about" in line
        assert "Ctrl-C" in line
        running.send_signal(signal.SIGINT)
        out, err = running.communicate()
    assert (running.returncode, err) == (128 + signal.SIGINT, "")
    answer = json.loads(out)
    assert answer["interrupted"]
    assert answer["rows"]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["long.toml", "rows"]
    assert mthp("report", output, "-o", tmp_path / "page.html").returncode == 0


@pytest.mark.parametrize(("total", "words"), [(10.0, ""), (8000.0, "mthp: the work takes about 2 h more; it ends\n")])
def test_the_forecast_is_one_line_and_only_of_what_is_long(
    capsys: pytest.CaptureFixture[str], total: float, words: str
) -> None:
    times = iter([0.0, 0.0, 1.0, 2.0, 3.0])
    forecast = Forecast("the work", "it ends", clock=lambda: next(times))
    for done in (0.0, 1.0, 2.0, 3.0):
        forecast(done, total)
    assert capsys.readouterr().err == words
    assert [about(seconds) for seconds in (40, 121, 7300, 400_000)] == ["40 s", "2 min", "2 h", "5 days"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("sample = 0.001\nduration = 99999\n" + SMALL, "rows of results"),
        ('duration = "1s"\n' + SMALL + "count = 100000\n", "processes"),
        ('duration = "1s"\n' + SMALL + "count = 9223372036854775807\n", "processes"),
        (
            'duration = "1s"\n[machine]\nmemory = "8G"\nnodes = 2000\n[[process]]\nworkload = "redis"\nmemory = "8M"\n',
            "nodes",
        ),
        ('duration = "1s"\nstep = "1h"\n' + SMALL, "step is longer"),
        ('duration = "1s"\n[[process]]\nworkload = "torch-loader"\ndataset = "1"\nworkers = 1000000000\n', "workers"),
        ('duration = "1s"\n[[process]]\nworkload = "go-heap"\nallocate = "7E"\n', "times the memory of the machine"),
        (
            'duration = "1s"\n[[process]]\nworkload = "sparse-arena"\nreserve = "8000T"\n',
            "times the memory of the machine",
        ),
        ("duration = 99999999999999999999999\n" + SMALL, "64 bits"),
        ("a = " + "[" * 2000 + "]" * 2000, "levels of nesting"),
        ("a." * 2000 + "a = 1", "parts of a dotted key"),
        ("duration = " + "9" * 5000, "not TOML"),
        ("\n".join(f"a{number} = 1" for number in range(70_000)), "unknown key"),
        ("[[process]]\n" * 70_000, "is missing"),
    ],
)
def test_a_scenario_that_is_too_large_is_refused(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "large.toml"
    path.write_text(text)
    assert word in bomb(path, "simulate", path)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["a = " + "[" * 2000 + "]" * 2000, "a." * 2000 + "a = 1", "x = " + "9" * 5000])
def test_rules_and_grids_that_are_made_to_hurt(tmp_path: Path, text: str) -> None:
    path = tmp_path / "hurts.toml"
    path.write_text(text)
    bomb(path, "daemon", "--check-config", "--config", path)
    bomb(path, "sweep", tmp_path, "--grid", path, "-o", tmp_path / "out")
    numbers = ", ".join(map(str, range(500)))
    path.write_text(f'policies = ["rfc"]\nmax_ptes_none = [{numbers}]\nmax_ptes_swap = [{numbers}]')
    assert "settings of a grid" in bomb(path, "sweep", tmp_path, "--grid", path, "-o", tmp_path / "out")
