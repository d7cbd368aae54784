"""Scenario files: valid keys and values, and the errors of others."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from mthp.errors import UsageError
from mthp.lab.scenario import load_scenario
from mthp.lab.scenariotables import Scenario, TrimSettings
from mthp.lab.workloads import MODELS
from mthp.lab.workloads.golang import GoHeap
from mthp.lab.workloads.redis import Redis
from mthp.lab.workloads.replayed import Replay
from mthp.toml import readers_of

GOOD = """
duration = "90s"
seed = 7
step = "250ms"
policy = "rfc:split"
[machine]
memory = "1.5G"
nodes = 2
fragmentation = "30%"
[switches]
enabled = "always"
64K = "inherit"
[tunables]
max_ptes_none = 64
[[process]]
workload = "redis"
memory = "400M"
churn = 0.05
[[process]]
workload = "service"
name = "web"
count = 3
limit = "24M"
[[fault]]
at = "1m"
kind = "kill"
process = "web"
[trim]
every = "10s"
start = "1m"
zero = "80%"
"""


def loaded(tmp_path: Path, text: str) -> Scenario:
    path = tmp_path / "scenario.toml"
    path.write_text(text)
    return load_scenario(path)


def test_every_table_is_read_in_its_units(tmp_path: Path) -> None:
    scenario = loaded(tmp_path, GOOD)
    settings, machine = scenario.settings, scenario.machine
    assert (settings.duration, settings.seed, settings.step, settings.policy) == (90.0, 7, 0.25, "rfc:split")
    assert (machine.memory, machine.nodes, machine.fragmentation) == (3 << 29, 2, 0.3)
    assert scenario.switches.enabled == "always"
    assert scenario.switches.sizes[4] == "inherit"
    assert scenario.switches.sizes[9] == "inherit"
    assert scenario.tunables is not None
    assert (scenario.tunables.max_ptes_none, scenario.tunables.max_ptes_swap) == (64, 64)
    first, second = scenario.processes
    assert first.model == Redis(memory=400 << 20, churn=0.05)
    assert (first.settings.name, second.settings.name, second.settings.count) == ("redis", "web", 3)
    assert scenario.faults[0].at == 60.0
    assert scenario.trim == TrimSettings(every=10.0, start=60.0, zero=0.8, free=1.0)


PROCESS = '[[process]]\nworkload = "service"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("duration = ", "not TOML"),
        (PROCESS, "duration is missing"),
        ('duration = "10s"', "no [[process]]"),
        ('duration = "10 parsecs"\n' + PROCESS, "'10 parsecs' is not a duration"),
        ('duration = "0s"\n' + PROCESS, "duration: '0s' is not above 0"),
        ("duration = -5\n" + PROCESS, "scenario.toml:1: duration: -5 is not a duration"),
        ("duration = inf\n" + PROCESS, "duration: inf is not a duration"),
        (f'duration = "{"9" * 400}s"\n' + PROCESS, "is not a duration"),
        ("duration = 1\n[machine]\nfragmentation = nan\n" + PROCESS, "machine.fragmentation: nan is not a share"),
        ("duration = 1\n[machine]\nmemory = 0\n" + PROCESS, "machine.memory: 0 is not above 0"),
        ('duration = 1\n[machine]\nmemory = "100000T"\n' + PROCESS, "simulating 97.7P with swap needs about"),
        ('duration = 1\n[machine]\nswap = "100000T"\n' + PROCESS, "with swap needs about"),
        ("duration = 1\n" + PROCESS + "core = 0\n", "process 1.core: 0 is not above 0"),
        ("duration = true\n" + PROCESS, "duration: True is not a duration"),
        ("duration = 1\ndurration = 1\n" + PROCESS, "did you mean 'duration'?"),
        ('duration = 1\npolicy = "best"\n' + PROCESS, "best"),
        ('duration = 1\npolicy = "mainline:magic"\n' + PROCESS, "mainline:magic"),
        ("duration = 1\n" + PROCESS + "[trim]\n", "trim.every is missing"),
        ("duration = 1\n" + PROCESS + "[trim]\nevery = 0\n", "trim.every: 0 is not above 0"),
        ("duration = 1\n" + PROCESS + '[trim]\nevery = "1s"\nzero = "0%"\n', "trim.zero: '0%' is not above 0"),
        ('duration = "60s"\n' + PROCESS + '[trim]\nevery = "1us"\n', "trims"),
        ("duration = 1\n" + PROCESS + "[[trim]]\nevery = 1\n", "trim is not a table"),
        ("duration = 1\nseed = 1.5\n" + PROCESS, "seed: 1.5 is not a whole number"),
        ('duration = 1\nkhugepaged = "yes"\n' + PROCESS, "khugepaged: 'yes' is not true or false"),
        ("duration = 1\nmachine = 5\n" + PROCESS, "machine is not a table"),
        ('duration = 1\n[machine]\nmemory = "-1G"\n' + PROCESS, "machine.memory: '-1G' is not a size"),
        ("duration = 1\n[machine]\nmemory = -1\n" + PROCESS, "machine.memory: -1 is not a size"),
        ('duration = 1\n[machine]\nmemory = "1X"\n' + PROCESS, "machine.memory: '1X' is not a size"),
        ('duration = 1\n[machine]\nmemory = "1M"\n' + PROCESS, "less than one PMD range"),
        ('duration = 1\n[machine]\nmemroy = "1G"\n' + PROCESS, "scenario.toml:3: machine.memroy is an unknown key"),
        (
            'duration = 1\n[machine]\nfragmentation = "130%"\n' + PROCESS,
            "fragmentation: '130%' is more than 100%",
        ),
        ("duration = 1\n[machine]\nmovable = 1\n" + PROCESS, "machine.movable: 1 has no unit"),
        ('duration = 1\n[machine]\ngeometry = "pdp-11"\n' + PROCESS, "geometry: 'pdp-11' is not known"),
        ('duration = 1\n[switches]\n65K = "always"\n' + PROCESS, "switches.65K is an unknown key"),
        ('duration = 1\n[switches]\n64K = "sometimes"\n' + PROCESS, "sometimes"),
        ("duration = 1\n[tunables]\nmax_ptes_none = 600\n" + PROCESS, "max_ptes_none: 600 is out of range"),
        ("duration = 1\n[tunables]\nmax_ptes = 6\n" + PROCESS, "tunables.max_ptes is an unknown key"),
        ('duration = 1\n[[process]]\nworkload = "emacs"\n', "process 1.workload: 'emacs' is not known"),
        ("duration = 1\n[process]\n", "process is not a list of tables"),
        ("duration = 1\n" + PROCESS + 'memory = "1G"\n', "process 1.memory is an unknown key"),
        ("duration = 1\n" + PROCESS + "start = 5\nstop = 4\n", "stops before it starts"),
        ("duration = 1\n" + PROCESS + 'core = "3G"\n', "the processes need 3080 MiB"),
        ("duration = 1\n" + PROCESS + '[[fault]]\nat = 1\nkind = "flood"\n', "fault 1.kind: 'flood' is not known"),
        (
            "duration = 1\n" + PROCESS + '[[fault]]\nat = 1\nkind = "kill"\nprocess = "x"\n',
            "a process that does not exist: 'x'",
        ),
        ("duration = 1\n" + PROCESS + '[[fault]]\nkind = "fragment"\n', "fault 1.at is missing"),
    ],
)
def test_what_cannot_be_is_said_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        loaded(tmp_path, text)
    assert words in f"{caught.value.message} {caught.value.help}"
    assert "scenario.toml" in caught.value.message


def test_every_error_of_a_scenario_is_reported_at_once(tmp_path: Path) -> None:
    text = """[machine]
nodes = 0
[switches]
64K = "on"
[[process]]
workload = "redis"
memory = "4"
churn = 4
[[process]]
workload = "nothing"
[[fault]]
kind = "kill"
"""
    with pytest.raises(UsageError) as caught:
        loaded(tmp_path, text)
    errors = [caught.value.message, *caught.value.help.splitlines()]
    found = re.findall(r"scenario\.toml(?::(\d+))?: ([\w. ]+?)(?: is |:)", "\n".join(errors))
    assert found == [
        *(("", "duration"), ("2", "machine.nodes"), ("4", "switches.64K")),
        *(("8", "process 1.churn"), ("10", "process 2.workload"), ("11", "fault 1.at")),
    ]


def test_sizes_of_switches_may_be_written_in_every_way(tmp_path: Path) -> None:
    text = f'duration = 1\n[switches]\n"128 KiB" = "always"\n"order=4" = "madvise"\n{PROCESS}'
    sizes = loaded(tmp_path, text).switches.sizes
    assert (sizes[4], sizes[5]) == ("madvise", "always")


def test_what_is_no_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        load_scenario(tmp_path / "nowhere.toml")


def test_a_recording_in_place_of_a_scenario_is_told_how_it_is_simulated(tmp_path: Path) -> None:
    path = tmp_path / "x.recording"
    path.write_bytes(b"\xff\xff\xff\xff")
    with pytest.raises(UsageError, match="not text") as caught:
        load_scenario(path)
    assert 'workload = "recording"' in caught.value.help


@pytest.mark.parametrize("name", MODELS)
def test_every_model_says_what_it_follows_and_each_parameter(name: str) -> None:
    model = MODELS[name]
    assert model.SOURCE
    documented = model.__doc__ or ""
    for parameter in dataclasses.fields(model):  # type: ignore[arg-type]
        assert f"{parameter.name}:" in documented


@pytest.mark.parametrize("written", ["200%", 2.0])
@pytest.mark.parametrize(("model", "key"), [(Replay, "speed"), (GoHeap, "gogc")])
def test_a_factor_may_be_above_100_percent(model: type, key: str, written: object) -> None:
    _, read = readers_of(model)[key]
    assert callable(read)
    assert read(written) == 2.0


def test_a_recording_is_not_replayed_at_no_speed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not above 0"):
        loaded(tmp_path, 'duration = "1s"\n[[process]]\nworkload = "recording"\nfile = "r.mthp"\nspeed = "0%"\n')
