"""The documentation: mthp accepts every command line, file and program in it."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

import mthp
from mthp.cli import COMMANDS, _mthp
from mthp.daemon import config
from mthp.engine.policy_lookup import known_policy
from mthp.engine.select import PlanOptions
from mthp.engine.verify import Expectation
from mthp.geometry import X86_64
from mthp.lab import grid, scenario
from mthp.lab.grid import Grid
from mthp.lab.scenario import load_scenario
from mthp.means import Means
from mthp.toml import TomlDocument
from rules_text import parse_configuration

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
PLACE = re.compile(r"[A-Z]{3,}|\.\w{2,}|[$/]")
"""A word that a reader replaces, or the name of a file."""

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

OWN = {"three-quarters"}
"""Policies that a page lets its reader write."""

READ_LATER: dict[str, tuple[Callable[[str], object], ...]] = {
    "--expect": (Expectation.parse, lambda text: X86_64.parse_order(Expectation.parse(text).size)),
    "--orders": (X86_64.parse_orders,),
    "--policies": (lambda text: [known_policy(word) for word in text.split(",") if word not in OWN],),
    "--policy": (lambda word: word in OWN or known_policy(word),),
}
"""Options with values that a command parses after click."""

OPTIONS = {field.name for kind in (PlanOptions, Means) for field in dataclasses.fields(kind)}
"""The keyword arguments that the library's verbs take as ``**options``."""


def commands() -> Iterator[Any]:
    """Every line of a page that runs mthp."""
    for page in PAGES:
        text = page.read_text()
        lines = [line for _, block in FENCE.findall(text) for line in block.splitlines()]
        lines += [" ".join(found.split()) for found in re.findall(r"`(mthp\s+[a-z][^`]*)`", text)]
        for line in lines:
            typed = re.sub(r"^(\$ |sudo )+", "", line).split("#")[0].split(" > ")[0].strip()
            if re.match(r"mthp (?!COMMAND)[a-z-]", typed):
                yield pytest.param(typed, id=f"{page.relative_to(ROOT)}: {typed}")


def blocks(language: str) -> Iterator[Any]:
    for page in PAGES:
        for number, (word, block) in enumerate(FENCE.findall(page.read_text())):
            if word == language:
                yield pytest.param(block, id=f"{page.relative_to(ROOT)} {number}")


@pytest.mark.parametrize("typed", list(commands()))
def test_a_command_line_has_options_that_exist_and_values_that_they_take(typed: str) -> None:
    words = shlex.split(typed)[1:]
    context = click.Context(_mthp, info_name="mthp")
    command: click.Command = _mthp
    while isinstance(command, click.Group) and words:
        found = command.get_command(context, words[0]) if not words[0].startswith("-") else None
        assert found is not None or words[0] in ("--version", "--help"), f"there is no command {words[0]}"
        if found is None:
            return
        # A context of its own: that of a group ends the options at the first argument.
        command, context, words = found, click.Context(found, parent=context, info_name=words[0]), words[1:]
    values, _, _ = command.make_parser(context).parse_args(words)
    for parameter in command.params:
        if isinstance(parameter, click.Option) and (value := values.get(parameter.name or "")) is not None:
            # Placeholders (PID, FILE) and the reader's files are not looked up.
            with contextlib.suppress(click.BadParameter) if PLACE.search(str(value)) else contextlib.nullcontext():
                parameter.type_cast_value(context, value)
                for read in READ_LATER.get(parameter.opts[0], ()):
                    for word in value if parameter.multiple else [value]:
                        read(word)


@pytest.mark.parametrize("text", list(blocks("toml")))
def test_a_toml_file_can_be_read(text: str, tmp_path: Path) -> None:
    keys = tomllib.loads(text)
    if "rule" in keys:
        assert parse_configuration(text, X86_64).rules
    elif "policies" in keys:
        document = TomlDocument.parse(text, "page")
        assert document.table(Grid) is not None
        document.check()
    else:
        (tmp_path / "page.toml").write_text(text)
        assert load_scenario(tmp_path / "page.toml").processes


@pytest.mark.parametrize("text", list(blocks("python")))
def test_a_program_uses_names_and_arguments_of_the_library(text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if (called := _of_the_library(node.func if isinstance(node, ast.Call) else node)) is None:
            continue
        found: Any = functools.reduce(getattr, called, mthp)
        if isinstance(node, ast.Call):
            places = [None for _ in node.args]
            bound = inspect.signature(found).bind(*places, **{each.arg: None for each in node.keywords if each.arg})
            assert bound.arguments.get("options", {}).keys() <= OPTIONS


def _of_the_library(node: ast.AST) -> list[str] | None:
    """Return the names behind ``mthp.``; None if the expression is another."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return names if names and isinstance(node, ast.Name) and node.id == "mthp" else None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#\s]+)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_every_command_has_a_place_in_the_pages() -> None:
    everything = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in COMMANDS if f"mthp {name}" not in everything] == []


def test_the_reference_has_every_key_of_the_toml_files(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs", reason="needs mkdocs (mthp[docs])")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    reference = importlib.import_module("reference")
    assert config.example().rstrip() in reference.rules_page()
    assert scenario.example().rstrip() in reference.scenarios_page()
    assert grid.example().rstrip() in reference.grids_page()


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    mkdocs = pytest.importorskip("mkdocs", reason="needs mkdocs (mthp[docs])")
    del mkdocs
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site")))
    for page in ("tutorial.html", "reference/commands.html", "reference/schemas/plan.json"):
        assert (tmp_path / "site" / page).stat().st_size > 1000
    for built in (tmp_path / "site").rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|link)\b[^>]*?(?:src|href)=\"?((?:https?:)?//[^\"> ]+)", built.read_text())
        assert loaded == [], f"{built.name} loads from another host"


def test_every_command_has_a_man_page(tmp_path: Path) -> None:
    pytest.importorskip("click_man", reason="needs click-man (mthp[docs])")
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "man.py", tmp_path], check=True, capture_output=True, text=True
    )
    names = {page.name for page in tmp_path.iterdir()}
    assert done.stdout.startswith(f"{len(names)} pages in ")
    assert {"mthp.1", *(f"mthp-{name}.1" for name in COMMANDS)} <= names
