"""``mthp simulate`` through the command line, and the report on its output."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.helpers import mthp, mthp_here, mthp_json

SCENARIO = """
duration = "3s"
[machine]
memory = "64M"
[[process]]
workload = "service"
core = "4M"
burst = "2M"
every = "1s"
count = 2
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "scenario.toml"
    path.write_text(SCENARIO)
    return path


def test_it_prints_what_came_of_it_and_writes_rows_that_a_report_shows(scenario: Path, tmp_path: Path) -> None:
    out, page = tmp_path / "rows.parquet", tmp_path / "out.html"
    done = mthp("simulate", scenario, "--policies", "mainline,pmd-only", "-o", out)
    assert done.returncode == 0, done.stderr
    assert "Processes under pmd-only" in done.stdout
    assert "service-2" in done.stdout
    assert mthp("report", out, "-o", page).returncode == 0
    text = page.read_text("utf-8")
    assert "Over simulated time" in text
    assert "workload = &#34;service&#34;" in text
    again = mthp("simulate", scenario, "-o", out)
    assert (again.returncode, "--force" in again.stderr) == (2, True)


def test_as_json_it_is_the_same_every_time(scenario: Path) -> None:
    first, second = (mthp("simulate", scenario, "--seed", "5", "--json").stdout for _ in range(2))
    assert first == second
    answer = mthp_json("simulate", scenario)
    assert (answer["name"], answer["seed"], answer["interrupted"]) == ("scenario.toml", 0, False)
    assert {row["process"] for row in answer["rows"]} == {"", "service-1", "service-2"}
    assert answer["rows"][-1]["huge_coverage"] <= 1.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("64M", "16M"), "the processes need"),
        (("service", "mainframe"), "workload: 'mainframe' is not known"),
        (("burst", "brust"), "did you mean 'burst'?"),
    ],
)
def test_a_scenario_that_cannot_be_is_refused(scenario: Path, change: tuple[str, str], words: str) -> None:
    text = SCENARIO.replace(*change)
    scenario.write_text(text.replace("4M", "14M") if change[1] == "16M" else text)
    done = mthp_here("simulate", scenario)
    assert done.returncode == 2
    assert words in done.stderr


def test_unknown_policies_and_missing_files_are_refused(scenario: Path, tmp_path: Path) -> None:
    assert mthp_here("simulate", scenario, "--policies", "best").returncode == 2
    assert mthp_here("simulate", tmp_path / "nowhere.toml").returncode == 2
    assert mthp_here("simulate", scenario, "--seed", "-1").returncode == 2
