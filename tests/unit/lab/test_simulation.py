"""Scenarios, run: the same every time, and what programs and faults do shows in the rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fakes import FakeSpace
from mthp.lab import simulated
from mthp.lab.figures import METRICS
from mthp.lab.scenario import load_scenario
from mthp.lab.simulated import Outcome
from mthp.lab.simulation import _Run, simulate
from mthp.lab.upkeep import Upkeep
from mthp.ptes import Pte
from mthp.report.simulations import report_on_simulation
from mthp.snapshot import record
from report_spaces import mixed
from simcheck import check

HEAD = """
duration = "{seconds}s"
sample = "1s"
step = "200ms"
[machine]
memory = "{memory}"
[tunables]
scan_sleep_millisecs = 500
"""
FULL_ONLY = """
max_ptes_none = 0
[switches]
64K = "inherit"
256K = "inherit"
2M = "inherit"
"""
"""Text after HEAD with folios of many sizes, and without filling."""
SMALL = {
    "redis": 'memory = "12M"\ngrow = "2s"\nsave_every = "3s"\nsave_takes = "1s"\nchurn = "5%"',
    "go-heap": 'live_memory = "4M"\nallocate = "8M"\nphase = "2s"',
    "sparse-arena": 'memory = "4M"\nreserve = "64M"\ngrow = "2s"',
    "torch-loader": 'dataset = "4M"\nbatch = "1M"\nepoch = "2s"',
    "service": 'core = "3M"\nburst = "2M"\nevery = "2s"\nlasts = "1s"',
}


def run(tmp_path: Path, *tables: str, seconds: int = 6, memory: str = "128M", **options: object) -> Outcome:
    path = tmp_path / "scenario.toml"
    path.write_text(HEAD.format(seconds=seconds, memory=memory) + "\n".join(tables))
    return simulate(load_scenario(path), **options)  # type: ignore[arg-type]


def process(name: str, more: str = "") -> str:
    return f'[[process]]\nworkload = "{name}"\n{SMALL[name]}\n{more}\n'


@pytest.mark.parametrize("name", SMALL)
def test_every_workload_runs_and_khugepaged_collapses_it(tmp_path: Path, name: str) -> None:
    outcome = run(tmp_path, process(name, "advise = true"))
    whole = [row for row in outcome.rows if not row["process"]]
    assert [row["seconds"] for row in whole] == pytest.approx(range(7), abs=0.2)
    assert outcome.last["resident_bytes"] > 2 << 20
    assert outcome.last["killed"] == 0
    assert outcome.last["scanned_ptes"] > 0
    assert whole[0]["resident_bytes"] == 0


@pytest.mark.parametrize("name", SMALL)
def test_every_workload_runs_on_a_machine_that_starts_fragmented(tmp_path: Path, name: str) -> None:
    coverage = {}
    for share in ("0%", "97%"):
        path = tmp_path / "scenario.toml"
        text = HEAD.format(seconds=6, memory="128M").replace("[tunables]", f'fragmentation = "{share}"\n[tunables]')
        path.write_text(text + process(name))
        outcome = simulate(load_scenario(path))
        assert outcome.last["killed"] == 0
        assert outcome.last["resident_bytes"] > 2 << 20
        coverage[share] = outcome.last["huge_coverage"]
    assert coverage["97%"] < coverage["0%"] - 0.2


def test_a_heap_that_may_not_grow_is_collected_all_the_time(tmp_path: Path) -> None:
    outcome = run(tmp_path, '[[process]]\nworkload = "go-heap"\nlive_memory = "1M"\nallocate = "1M"\ngogc = 0')
    assert outcome.last["resident_bytes"] >= 1 << 20


def test_what_the_programs_of_a_machine_leave_adds_up(tmp_path: Path) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(HEAD.format(seconds=4, memory="256M") + "".join(process(name) for name in SMALL))
    scenario = load_scenario(path)
    inside = _Run(scenario, "mainline", None, lambda done, total: None, lambda: False)
    outcome = inside.run()
    assert check(inside.machine) == []
    assert {row["process"] for row in outcome.rows} == {"", *SMALL}
    last = [row for row in outcome.rows if row["seconds"] == outcome.last["seconds"]]
    parts = [row for row in last if row["process"]]
    assert sum(row["resident_bytes"] for row in parts) == outcome.last["resident_bytes"]
    shares = [value for name, value in outcome.last.items() if name.startswith("order_share_")]
    assert sum(shares) == pytest.approx(1.0)
    own = {"policy", "seconds", "process", "processes", "killed", "free_bytes"}
    assert {name for name in outcome.last if not name.startswith("order_share_")} - own <= set(METRICS)


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    tables = (process("redis"), process("service", "count = 2"))
    files = []
    for number, seed in enumerate((3, 3, 4)):
        outcome = run(tmp_path, *tables, seconds=4, seed=seed)
        files.append(tmp_path / f"{number}.parquet")
        simulated.write(files[-1], [outcome], {"schema": simulated.SCHEMA})
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes() != files[2].read_bytes()
    assert simulated.is_simulated(files[0])
    assert not simulated.is_simulated(tmp_path / "scenario.toml")
    assert simulated.read(files[0]).rows[0]["seconds"] == 0.0


def test_policies_differ_on_sparse_memory(tmp_path: Path) -> None:
    # Faulted in small: what becomes large is khugepaged's doing.
    table = process("sparse-arena", 'advise_after = "2500ms"')
    fills = run(tmp_path, table, seconds=8, policy="pmd-only").last
    path = (tmp_path / "scenario.toml").read_text()
    (tmp_path / "strict").mkdir()
    strict = tmp_path / "strict" / "scenario.toml"
    strict.write_text(path.replace("scan_sleep_millisecs", "max_ptes_none = 0\nscan_sleep_millisecs"))
    sparing = simulate(load_scenario(strict), policy="pmd-only").last
    assert fills["resident_bytes"] > 3 * sparing["resident_bytes"]
    assert sparing["bloat_bytes"] == 0
    assert fills["bloat_bytes"] == fills["resident_bytes"] - sparing["resident_bytes"]


def test_without_huge_pages_a_sparse_arena_is_what_it_touches(tmp_path: Path) -> None:
    last = run(tmp_path, process("sparse-arena", "advise = false")).last
    assert last["resident_bytes"] == 4 << 20
    assert last["huge_coverage"] == 0.0


def test_processes_begin_and_end_when_they_are_to(tmp_path: Path) -> None:
    outcome = run(tmp_path, process("service", 'start = "2s"\nstop = "4s"\nname = "web"'))
    living = {round(row["seconds"]): row["processes"] for row in outcome.rows if not row["process"]}
    assert (living[1], living[3], living[5]) == (0, 1, 0)


@pytest.mark.parametrize("head", ["khugepaged = false\n", ""])
@pytest.mark.parametrize("sample", [0.1, 0.3])
def test_samples_are_taken_at_their_times_up_to_the_end(tmp_path: Path, head: str, sample: float) -> None:
    path = tmp_path / "scenario.toml"
    text = HEAD.format(seconds=3, memory="128M").replace('sample = "1s"', f'sample = "{sample}s"')
    path.write_text(head + text + process("redis"))
    rows = [row for row in simulate(load_scenario(path)).rows if not row["process"]]
    assert len(rows) == round(3 / sample) + 1
    # The cost of work delays a sample, but not the next ones.
    late = [row["seconds"] - number * sample for number, row in enumerate(rows)]
    assert min(late) > -1e-6
    assert late[-1] < sample


def test_a_killed_process_is_gone_and_its_memory_free(tmp_path: Path) -> None:
    fault = '[[fault]]\nat = "3s"\nkind = "kill"\nprocess = "redis"\n'
    outcome = run(tmp_path, process("redis"), fault)
    assert outcome.last["processes"] == 0
    assert outcome.last["free_bytes"] > 120 << 20
    assert outcome.last["killed"] == 0


def test_a_limit_that_is_too_small_kills(tmp_path: Path) -> None:
    fault = '[[fault]]\nat = "1s"\nkind = "limit"\nprocess = "redis"\nsize = "1M"\n'
    outcome = run(tmp_path, process("redis", "advise = false"), process("service"), fault)
    assert outcome.last["killed"] == 1
    assert outcome.last["processes"] == 1


@pytest.mark.parametrize("more", ["", 'limit = "1M"\n'])
def test_a_limit_of_0_is_none(tmp_path: Path, more: str) -> None:
    fault = '[[fault]]\nat = "0s"\nkind = "limit"\nprocess = "redis"\nsize = 0\n'
    outcome = run(tmp_path, process("redis", f"advise = false\n{more}"), fault)
    assert (outcome.last["killed"], outcome.last["processes"]) == (0, 1)


def test_pinned_pages_are_left_alone_and_let_go(tmp_path: Path) -> None:
    fault = '[[fault]]\nat = "2500ms"\nkind = "pin"\nprocess = "service"\nshare = "10%"\nlasts = "1s"\n'
    path = tmp_path / "scenario.toml"
    path.write_text(HEAD.format(seconds=5, memory="64M") + process("service") + fault)
    inside = _Run(load_scenario(path), "mainline", None, lambda done, total: None, lambda: False)
    inside.run()
    assert not +inside.machine.parts.pins
    assert check(inside.machine) == []


@pytest.mark.parametrize(
    ("of_the_process", "fault"),
    [
        ("", ""),
        ('stop = "2s"', ""),
        ('advise_after = "1s"', ""),
        ("", '[[fault]]\nat = "2s"\nkind = "kill"\nprocess = "service"\n'),
    ],
)
def test_without_khugepaged_all_work_is_that_of_programs(tmp_path: Path, of_the_process: str, fault: str) -> None:
    path = tmp_path / "scenario.toml"
    text = HEAD.format(seconds=3, memory="64M") + process("service", of_the_process) + fault
    path.write_text(f"khugepaged = false\n{text}")
    last = simulate(load_scenario(path)).last
    assert (last["scanned_ptes"], last["khugepaged_seconds"]) == (0, 0.0)


def test_it_stops_when_it_is_told_and_keeps_what_was(tmp_path: Path) -> None:
    asked = iter(range(10_000))
    outcome = run(tmp_path, process("service"), seconds=60, stop=lambda: next(asked) > 30)
    assert outcome.interrupted
    assert 0 < len(outcome.rows) < 60


def test_a_recording_is_lived_again(tmp_path: Path) -> None:
    space = FakeSpace([mixed(0x7F00_0000_0000, 4, 0.6)])
    record(space, tmp_path / "before.parquet")
    state = space.read([(0x7F00_0000_0000, 0x7F00_0000_0000 + (4 << 21))]).state
    held = int(np.count_nonzero((state & (Pte.PRESENT | Pte.SWAP)) != 0))
    table = '[[process]]\nworkload = "recording"\nfile = "before.parquet"\nadvise = false\n'
    assert run(tmp_path, table, seconds=2).last["resident_bytes"] == held * 4096


def test_results_become_a_report(tmp_path: Path) -> None:
    outcomes = [run(tmp_path, process("service"), seconds=3, policy=policy) for policy in ("mainline", "pmd-only")]
    scenario = load_scenario(tmp_path / "scenario.toml")
    path = tmp_path / "out.parquet"
    simulated.write(path, outcomes, simulated.about(scenario, 0, ["mainline", "pmd-only"], "0"))
    found = simulated.read(path)
    document = report_on_simulation(found.rows, found.about, [])
    assert document.title == "scenario.toml"
    charts = document.sections[0].charts
    assert [series.name for series in charts[0].series] == ["mainline", "pmd-only"]
    assert len(charts[0].series[0].points) == 4
    memory = next(each for each in charts if each.title == "Resident memory")
    assert memory.summary == "Memory of all programs together, filled holes included."


@pytest.mark.parametrize("name", SMALL)
def test_mthp_visits_every_workload_in_the_place_of_khugepaged(tmp_path: Path, name: str) -> None:
    path = tmp_path / "scenario.toml"
    path.write_text(HEAD.format(seconds=6, memory="128M") + FULL_ONLY + process(name, 'advise_after = "1s"'))
    inside = _Run(load_scenario(path), "mainline:split", None, lambda done, total: None, lambda: False)
    outcome = inside.run()
    assert check(inside.machine) == []
    assert inside.machine.khugepaged.statistics.passes == 0
    assert outcome.policy == outcome.last["policy"] == "mainline:split"
    assert outcome.last["killed"] == 0
    alone = simulate(load_scenario(path), policy="mainline")
    assert outcome.last["large_coverage"] == pytest.approx(alone.last["large_coverage"], abs=0.1)


def test_by_splitting_mthp_makes_what_the_policy_makes(tmp_path: Path) -> None:
    # Without chance in time both see the same memory; only the zero pages between the folios differ.
    table = FULL_ONLY + process("sparse-arena", 'run = "64K"\nadvise_after = "2500ms"')
    alone, split = (run(tmp_path, table, seconds=8, policy=name).last for name in ("mainline", "mainline:split"))
    assert alone["order_share_4"] > 0.9
    # A folio of the PMD size each time, of which several come.
    assert split["alloc_attempts"] < alone["alloc_attempts"]
    assert split["large_coverage"] == pytest.approx(alone["large_coverage"], abs=0.02)
    assert split["resident_bytes"] == pytest.approx(alone["resident_bytes"], rel=0.02)


def test_a_trim_gives_back_what_collapses_filled(tmp_path: Path) -> None:
    table = process("sparse-arena", 'reuse = "0%"\nadvise_after = "2500ms"')
    untouched = run(tmp_path, table, seconds=8, policy="pmd-only").last
    trimmed = run(tmp_path, '[trim]\nevery = "8s"\n', table, seconds=8, policy="pmd-only").last
    assert untouched["given_back_bytes"] == 0
    assert 0 < trimmed["given_back_bytes"] <= trimmed["bloat_bytes"]
    assert trimmed["resident_bytes"] == untouched["resident_bytes"] - trimmed["given_back_bytes"]


@pytest.mark.parametrize(("words", "trims"), [('start = "9s"', False), ('free = "1%"', False), ('zero = "1%"', True)])
def test_trims_come_when_they_are_to(tmp_path: Path, words: str, trims: bool) -> None:
    table = process("sparse-arena", 'advise_after = "2500ms"')
    last = run(tmp_path, f'[trim]\nevery = "1s"\n{words}\n', table, seconds=8, policy="pmd-only").last
    assert (last["given_back_bytes"] > 0) == trims


@pytest.mark.parametrize(("takes", "begun"), [(0.25, [1, 2, 3, 4, 5, 6]), (1.5, [1, 2.5, 4, 5.5])])
def test_trims_begin_at_regular_times_whatever_they_take(
    takes: float, begun: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def trim(upkeep: Upkeep, programs: object, settings: object) -> None:
        seen.append(upkeep._machine.clock.now_ns / 1e9)
        upkeep._machine.clock.wait_ns(round(takes * 1e9))

    monkeypatch.setattr(Upkeep, "trim", trim)
    run(tmp_path, '[trim]\nevery = "1s"\n', process("sparse-arena"), seconds=6)
    # Actions of the programs at the same time come first.
    assert seen == pytest.approx(begun, abs=0.05)
