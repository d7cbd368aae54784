"""docs/figures.md: every key, option, metric and heading, each with one definition."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import mthp
from mthp.cli import COMMANDS, _mthp
from mthp.cli.schema_command import OBJECTS, schema
from mthp.daemon.config import Own
from mthp.daemon.rules import Settings
from mthp.lab import scenariotables
from mthp.lab.grid import Grid
from mthp.lab.workloads import MODELS
from mthp.naming import Match
from mthp.toml import readers_of
from mthp.top.columns import COLUMNS
from mthp.tunables import Tunables

SOURCE = Path(mthp.__file__).parent
FIGURES = Path(__file__).parents[3] / "docs" / "figures.md"
ROW = re.compile(r"\| `([^`|]+)` \| ([^|]+) \| ([^|]*) \| ([^|]+) \|")
TABLES = (
    Own,
    Match,
    Settings,
    Grid,
    scenariotables.TopLevelKeys,
    scenariotables.MachineSettings,
    scenariotables.ProcessSettings,
    scenariotables.TrimSettings,
)


def json_keys() -> set[str]:
    found: set[str] = set()

    def walk(part: object) -> None:
        if isinstance(part, dict):
            found.update(part.get("properties", {}))
            found.update("order_share" for _ in part.get("patternProperties", {}))
            for value in part.values():
                walk(value)
        elif isinstance(part, list):
            for each in part:
                walk(each)

    for name in OBJECTS:
        walk(schema(name))
    return found


def options() -> set[str]:
    with click.Context(_mthp) as context:
        commands = [_mthp.get_command(context, name) for name in COMMANDS]
    parts = [each for one in commands for each in (one.commands.values() if isinstance(one, click.Group) else [one])]
    return {name for part in parts if part for each in part.params for name in each.opts if name.startswith("--")}


def toml_keys() -> set[str]:
    classes = (*TABLES, scenariotables.FaultSettings, *MODELS.values())
    # The tables [tunables], [switches] and [[rule]] are not dataclasses of the same names.
    tunables = {field.name for field in dataclasses.fields(Tunables)}
    return {key for each in classes for key in readers_of(each)} | tunables | {"enabled", "deny", "match", "name"}


def metrics() -> set[str]:
    tree = ast.parse((SOURCE / "daemon" / "exporter.py").read_text())
    words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return {word for word in words if isinstance(word, str) and re.fullmatch("mthp_[a-z_]+", word)}


def headings() -> set[str]:
    found = {head for _, head, _ in COLUMNS if head}
    for path in (SOURCE / "cli").rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef):
                found |= _heads(function)
    return found


def _heads(function: ast.FunctionDef) -> set[str]:
    """Return the headings of the tables that a function makes, with placeholders between braces."""
    given = [call.args[1] for call in ast.walk(function) if _calls(call, "Table") and isinstance(call, ast.Call)]
    names = {each.id for each in given if isinstance(each, ast.Name)}
    lists: list[ast.AST] = list(given)
    for node in ast.walk(function):
        if isinstance(node, ast.Assign | ast.AugAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            lists += [node.value for each in targets for name in ast.walk(each) if _named(name, names)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and _named(node.func.value, names):
            lists += node.args
    return {text for part in lists for text in _texts(part) if text}


def _calls(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _named(node: ast.AST, names: set[str]) -> bool:
    return isinstance(node, ast.Name) and (node.id in names or (node.id == "heads" and bool(names)))


def _texts(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.JoinedStr):
        yield ast.unparse(node)[2:-1]
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif not isinstance(node, ast.Subscript):
        for child in ast.iter_child_nodes(node):
            yield from _texts(child)


SURFACES = {"JSON": json_keys, "option": options, "TOML": toml_keys, "metric": metrics, "heading": headings}


@pytest.mark.parametrize("surface", SURFACES)
def test_every_name_is_defined_and_every_defined_name_exists(surface: str) -> None:
    rows = [match.groups() for line in FIGURES.read_text().splitlines() if (match := ROW.fullmatch(line))]
    defined = {name for name, surfaces, *_ in rows if surface in surfaces.split(", ")}
    assert SURFACES[surface]() == defined


def test_a_name_has_one_definition() -> None:
    rows = [line for line in FIGURES.read_text().splitlines() if line.startswith("| `")]
    names = [match[1] for line in rows if (match := ROW.fullmatch(line))]
    assert len(names) == len(rows)
    assert sorted(names) == sorted(set(names))
