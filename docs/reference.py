"""Make the reference pages of the site from the code: a hook of MkDocs.

What a page of reference says is what the code does: commands from click, keys of TOML files from the dataclasses that
read them, objects from their JSON Schema, the library from its docstrings. The one thing that is written by hand is
``docs/figures.md``, the definition of every name, and a test holds that against the code.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import mthp
from mthp.cli import COMMANDS, _mthp
from mthp.cli.schema_command import OBJECTS, schema
from mthp.daemon import config
from mthp.lab import grid, scenario

DEFINITIONS = Path(__file__).with_name("figures.md")
ROW = re.compile(r"\| `([^`|]+)` \| ([^|]+) \| ([^|]*) \| ([^|]+) \|")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages. Called by MkDocs before it reads any."""
    for name, text in pages():
        files.append(File.generated(config, f"reference/{name}", content=text))
    return files


def pages() -> Iterator[tuple[str, str]]:
    """Yield the path of each generated file, below ``reference/``, and its text."""
    yield "commands.md", commands_page()
    yield "rules.md", rules_page()
    yield "scenarios.md", scenarios_page()
    yield "grids.md", grids_page()
    yield "json.md", json_page()
    for name in OBJECTS:
        yield f"schemas/{name}.json", json.dumps(schema(name), indent=2)
    yield "metrics.md", metrics_page()
    yield "library.md", library_page()


def commands_page() -> str:
    """Return the help of every command."""
    parts = ["# Commands", "What `mthp COMMAND --help` prints."]
    with click.Context(_mthp, info_name="mthp", terminal_width=100) as context:
        for name in COMMANDS:
            command = _mthp.get_command(context, name)
            assert command is not None
            parts += [f"## mthp {name}", COMMANDS[name], *_helps(command, name, context)]
    return "\n\n".join(parts) + "\n"


def _helps(command: click.Command, name: str, parent: click.Context) -> Iterator[str]:
    with click.Context(command, info_name=name, parent=parent, terminal_width=100) as context:
        yield _block("text", command.get_help(context))
        if isinstance(command, click.Group):
            for each in command.list_commands(context):
                part = command.get_command(context, each)
                assert part is not None
                yield f"### mthp {name} {each}"
                yield from _helps(part, each, context)


def rules_page() -> str:
    """Return what a rules file may say."""
    return _example("Rules", "mthp daemon --print-config", config.example())


def scenarios_page() -> str:
    """Return what a scenario may say."""
    return _example("Scenarios", "mthp simulate --print-scenario", scenario.example())


def grids_page() -> str:
    """Return what a grid may say."""
    return _example("Grids", "mthp sweep --print-grid", grid.example())


def _example(title: str, command: str, text: str) -> str:
    return f"# {title}\n\nWhat `{command}` prints: every key, with its default.\n\n{_block('toml', text)}\n"


@functools.cache
def definitions() -> dict[str, str]:
    """Return the definition of every name in docs/figures.md."""
    return {row[1]: row[4].strip() for row in map(ROW.match, DEFINITIONS.read_text().splitlines()) if row}


def json_page() -> str:
    """Return the objects of the commands."""
    parts = [
        "# JSON",
        "Each command that ends with a result prints one object with `--json`. Its key `schema` is `mthp.<command>/1`. "
        "Where a command failed, the object has only `schema` and `error`. [Figures](../figures.md) defines every key.",
        "| command | JSON Schema |\n|---|---|",
    ]
    rows = "\n".join(f"| `mthp {name}` | [{name}.json](schemas/{name}.json) |" for name in OBJECTS)
    return "\n\n".join(parts) + f"\n{rows}\n"


def metrics_page() -> str:
    """Return the metrics of the daemon."""
    rows = [row for row in map(ROW.match, DEFINITIONS.read_text().splitlines()) if row and "metric" in row[2]]
    table = "\n".join(f"| `{row[1]}` | {row[3]} | {row[4].strip()} |" for row in rows)
    text = "`mthp daemon --metrics 9464` serves these on the loopback. Counters end in `_total` on the page."
    return f"# Metrics\n\n{text}\n\n| metric | unit | what it is |\n|---|---|---|\n{table}\n"


def library_page() -> str:
    """Return the public names of the package, with their docstrings."""
    parts = ["# Library", inspect.cleandoc(mthp.__doc__ or "")]
    for name in sorted(set(mthp.__all__) - {"__version__"}, key=lambda name: (name.lower(), name)):
        thing: Any = getattr(mthp, name)
        signature = "" if inspect.ismodule(thing) or _is_enum(thing) else str(inspect.signature(thing))
        # A default that is a function shows its address, which is another one at every build.
        signature = re.sub(r"<function .*? at 0x[0-9a-f]+>", "...", signature)
        parts += [
            f"## mthp.{name}",
            _block("python", f"{name}{signature}"),
            _block("text", inspect.getdoc(thing) or ""),
        ]
    return "\n\n".join(parts) + "\n"


def _is_enum(thing: object) -> bool:
    return isinstance(thing, type) and hasattr(thing, "__members__")


def _block(language: str, text: str) -> str:
    return f"~~~{language}\n{text.rstrip()}\n~~~"
