"""The documentation: what it tells a reader to type and to write is what mthp takes."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from mthp.cli import COMMANDS, _mthp
from mthp.daemon.configuration import parse_configuration
from mthp.geometry import X86_64
from mthp.lab.grid import Grid
from mthp.lab.scenario import load_scenario
from mthp.toml import Document

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> Iterator[Any]:
    """Every line of a page that runs mthp."""
    for page in PAGES:
        text = page.read_text()
        lines = [line for _, block in FENCE.findall(text) for line in block.splitlines()]
        lines += re.findall(r"`(mthp [a-z][^`]*)`", text)
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
def test_a_command_line_has_options_that_there_are(typed: str) -> None:
    words = shlex.split(typed)[1:]
    context = click.Context(_mthp, info_name="mthp")
    command: click.Command = _mthp
    while isinstance(command, click.Group) and words:
        found = command.get_command(context, words[0]) if not words[0].startswith("-") else None
        assert found is not None or words[0] in ("--version", "--help"), f"there is no command {words[0]}"
        if found is None:
            return
        command, words = found, words[1:]
    command.make_parser(context).parse_args(words)


@pytest.mark.parametrize("text", list(blocks("toml")))
def test_a_toml_file_can_be_read(text: str, tmp_path: Path) -> None:
    keys = tomllib.loads(text)
    if "rule" in keys:
        assert parse_configuration(text, X86_64).rules
    elif "policies" in keys:
        document = Document.parse(text, "page")
        assert document.table(Grid) is not None
        document.check()
    else:
        (tmp_path / "page.toml").write_text(text)
        assert load_scenario(tmp_path / "page.toml").processes


@pytest.mark.parametrize("text", list(blocks("python")))
def test_a_program_compiles(text: str) -> None:
    compile(text, "page", "exec")


def test_every_command_has_a_place_in_the_pages() -> None:
    everything = "\n".join(page.read_text() for page in PAGES)
    assert [name for name in COMMANDS if f"mthp {name}" not in everything] == []


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    mkdocs = pytest.importorskip("mkdocs", reason="needs mkdocs (mthp[docs])")
    del mkdocs
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site")))
    for page in ("tutorial.html", "reference/commands.html", "reference/schemas/plan.json"):
        assert (tmp_path / "site" / page).stat().st_size > 1000


def test_every_command_has_a_man_page(tmp_path: Path) -> None:
    pytest.importorskip("click_man", reason="needs click-man (mthp[docs])")
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "man.py", tmp_path], check=True, capture_output=True, text=True
    )
    names = {page.name for page in tmp_path.iterdir()}
    assert done.stdout.startswith(f"{len(names)} pages in ")
    assert {"mthp.1", *(f"mthp-{name}.1" for name in COMMANDS)} <= names
