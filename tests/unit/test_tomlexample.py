"""The texts of --print-config, --print-scenario and --print-grid: every key, and the defaults."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mthp.cli import main
from mthp.daemon import config
from mthp.daemon.config import Own
from mthp.daemon.rules import Settings
from mthp.geometry import X86_64
from mthp.lab import grid, scenario, scenariotables
from mthp.lab.grid import Grid, read_grid
from mthp.lab.scenario import load_scenario
from mthp.lab.workloads import MODELS
from mthp.toml import TomlDocument, readers_of, text, whole
from mthp.tomlexample import UNCOMMENTED, table_text
from mthp.tunables import Switches, Tunables
from rules_text import parse_configuration

READERS = {"file": text, "orders": lambda value: value, "limit": whole(0, 511)}


def uncommented(example: str) -> dict[str, Any]:
    return tomllib.loads(UNCOMMENTED.sub("", example))


@pytest.mark.parametrize(
    ("arguments", "example"),
    [
        (["daemon", "--print-config"], config.example),
        (["simulate", "--print-scenario"], scenario.example),
        (["sweep", "--print-grid"], grid.example),
    ],
)
def test_the_text_is_printed_without_any_other_argument(
    arguments: list[str], example: Callable[[], str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 0
    assert capsys.readouterr().out == example()
    assert all(len(line) <= 120 for line in example().splitlines())


@pytest.mark.parametrize(
    ("kind", "example", "place"),
    [
        (Own, config.example, ("daemon",)),
        (Settings, config.example, ("defaults",)),
        (Grid, grid.example, ()),
        (scenariotables.TopLevelKeys, scenario.example, ()),
        (scenariotables.MachineSettings, scenario.example, ("machine",)),
        (scenariotables.FaultSettings, scenario.example, ("fault", 0)),
        (scenariotables.TrimSettings, scenario.example, ("trim",)),
        (scenariotables.ProcessSettings, scenario.example, ("process", 0)),
        *((model, scenario.example, ("process", number)) for number, model in enumerate(MODELS.values())),
    ],
)
def test_every_key_of_a_table_is_there_with_its_default(
    kind: Any, example: Callable[[], str], place: tuple[str | int, ...]
) -> None:
    data: Any = uncommented(example())
    document = TomlDocument("", data, "example", READERS)
    for part in place:
        data = data[part]
    assert readers_of(kind).keys() <= data.keys()
    found = document.table(kind, *place, beside=tuple(data))
    document.check()
    assert found is not None
    for field in dataclasses.fields(kind):
        if field.default not in (dataclasses.MISSING, None, ()):
            assert getattr(found, field.name) == field.default


@pytest.mark.parametrize("example", [config.example, scenario.example])
def test_every_tunable_and_switch_is_there_with_the_value_of_a_kernel(example: Callable[[], str]) -> None:
    data, switches = uncommented(example()), Switches.defaults(X86_64)
    assert data["tunables"] == dataclasses.asdict(Tunables.defaults(X86_64))
    assert data["switches"] == {"enabled": switches.enabled, **switches.words_by_size(X86_64)}


def test_rules_that_are_printed_set_no_defaults() -> None:
    printed, nothing = parse_configuration(config.example(), X86_64), parse_configuration("", X86_64)
    assert dataclasses.replace(printed, rules=nothing.rules) == nothing
    assert [rule.deny for rule in printed.rules.rules] == [True, False, False]
    assert parse_configuration(UNCOMMENTED.sub("", config.example()), X86_64).keep_max_ptes_none == 0


def test_a_scenario_and_a_grid_that_are_printed_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(grid.example())
    assert read_grid(tmp_path / "grid.toml") == Grid(("rfc", "mainline", "no-creep"))
    (tmp_path / "scenario.toml").write_text(scenario.example())
    loaded = load_scenario(tmp_path / "scenario.toml")
    assert loaded.settings == scenariotables.TopLevelKeys(duration=60.0)
    assert (loaded.machine, loaded.faults, loaded.trim) == (scenariotables.MachineSettings(), (), None)
    ((settings, model),) = [(each.settings, each.model) for each in loaded.processes]
    assert (settings.name, model) == ("redis", MODELS["redis"]())


def test_without_docstrings_keys_have_no_meaning() -> None:
    @dataclasses.dataclass
    class Table:
        number: int = 3

    Table.__doc__ = None
    assert table_text(Table, "[table]") in ("[table]\n", "[table]\n# number = 3\n")


@pytest.mark.parametrize("arguments", [["simulate"], ["sweep"], ["sweep", "dir", "--grid", "file"]])
def test_without_what_it_works_on_a_command_names_what_is_missing(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert "--print-" in capsys.readouterr().err
