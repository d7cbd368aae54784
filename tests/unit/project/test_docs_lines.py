"""The documentation: each line to type that does not begin with mthp, and each name in the text, exists.

``test_docs.py`` checks the lines that run mthp itself.
"""

from __future__ import annotations

import functools
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from mthp.cli import COMMANDS, _mthp
from mthp.heatfile import read_heat

ROOT = Path(__file__).parents[3]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "changes/README.md")),
    *(ROOT / "tests" / name / "README.md" for name in ("golden", "vm")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

OTHERS = {
    "apt",
    "apt-get",
    "awk",
    "cat",
    "cd",
    "echo",
    "git",
    "head",
    "kill",
    "ln",
    "mkfifo",
    "perf",
    "pid=$!",
    "systemctl",
}
"""Programs that are not of this project."""

ABSENT = {"--force"}
"""Options of which a page says that they do not exist."""

NOT_TYPED = re.compile(r"[^\x00-\x7f]|^(#|sum by |\[|[a-z-]+ = |start,|0x|[0-9]+,|\{|    END)|^\s*$")
"""Lines of a block that show something: a drawing, a comment, a query, a file."""


def lines() -> Iterator[Any]:
    """Yield each line to type, joined with the lines that continue it."""
    for page in PAGES:
        # Other languages are programs and files, which other tests read.
        blocks = [block for language, block in FENCE.findall(page.read_text()) if language in ("", "console")]
        for block in blocks:
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith(">") or NOT_TYPED.search(line):
                    continue
                here = re.sub(r"^(\$ |sudo )+", "", line).strip()
                if not here.startswith("mthp"):
                    yield pytest.param(here, id=f"{page.relative_to(ROOT)}: {here}")


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in words:
        name, _, value = word.partition("=")
        assert re.search(rf"^{name}:", makefile, re.MULTILINE) if not value else f"({name}" in makefile, word


def check_python(words: list[str]) -> None:
    if words[:2] == ["-m", "vm"]:
        check_click(importable_lab(), words[2:])
    elif words[0] != "-m" and words[0].startswith("bench/"):
        text = (ROOT / words[0]).read_text()
        assert [word for word in words[1:] if not word[0].isdigit() and word.split(",")[0] not in text] == []
    else:
        assert words[:2] == ["-m", "venv"] or words[0] == "holes.py", words


def importable_lab() -> click.Group:
    from vm.__main__ import main

    return main


def check_click(group: click.Group, words: list[str]) -> None:
    context = click.Context(group)
    command = group.get_command(context, words[0])
    assert command is not None, words[0]
    command.make_parser(click.Context(command)).parse_args(words[1:])


def check_pytest(words: list[str]) -> None:
    paths = [word for word in words if word.startswith("tests/")]
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if found := re.search(r"\[(.*)\]", word):
            assert set(found[1].split(",")) <= set(extras)


def check_container(words: list[str]) -> None:
    """An image is run with a command of mthp as the last words."""
    assert words[0] == "run"
    inside = words[words.index("mthp") + 1 :]
    assert inside[0] in COMMANDS


def check_files(words: list[str]) -> None:
    """A program of the system gets files of this project."""
    for word in words:
        assert not word.startswith("packaging/") or (ROOT / word).exists(), word


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "docker": check_container,
    "kubectl": check_files,
    "make": check_make,
    "pip": check_pip,
    "pipx": check_pip,
    "pre-commit": lambda words: None,
    "promtool": check_files,
    "pytest": check_pytest,
    "python": check_python,
    "python3": check_python,
}


@pytest.mark.parametrize("line", list(lines()))
def test_a_line_runs_what_exists(line: str) -> None:
    words = shlex.split(line, comments=True)
    while re.match("[A-Z_]+=", words[0]):
        assert words[0].split("=")[0] in everything() or words[0].startswith("PYTHONPATH=")
        words = words[1:]
    program = words[0].rsplit("/", 1)[-1]
    assert program in OTHERS | CHECKS.keys(), "a test has to know how to check this line"
    if program in CHECKS:
        CHECKS[program](words[1:])


@functools.cache
def everything() -> str:
    """Return the text of all programs."""
    files = [path for name in ("src", "tests", "bench") for path in (ROOT / name).rglob("*.py")]
    return "\n".join(path.read_text() for path in files if path != Path(__file__))


@functools.cache
def options() -> set[str]:
    """Return the options of all commands of mthp and of the lab."""
    found: set[str] = {"--help"}
    pending: list[click.Command] = [_mthp, importable_lab()]
    while pending:
        command = pending.pop()
        found |= {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
        if isinstance(command, click.Group):
            context = click.Context(command)
            pending += [each for name in command.list_commands(context) if (each := command.get_command(context, name))]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_what_exists(page: Path) -> None:
    text = page.read_text()
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    ours = [span for span in spans if span.split()[0] not in OTHERS]
    names = {word for span in ours for word in re.findall(r"(?<![\w-])--[a-z][a-z-]+", span)}
    # Benchmarks read options of their own without click.
    assert names - options() - ABSENT - set(re.findall(r"--[a-z-]+", everything())) == set()
    assert {word for word in re.findall(r"\bMTHP_[A-Z_]+", text) if word not in everything()} == set()
    assert {
        word
        for word in re.findall(r"\bmthp_[a-z_]+\b", text)
        if re.sub("_(total|bucket|sum|count)$", "", word) not in everything()
    } == set()
    paths = [span for span in spans if re.match(r"(tests|bench|docs|src|packaging|changes|\.ci)/[\w/.-]+$", span)]
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    pages = [str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")]
    assert [page for page in pages if page not in navigation] == []


def test_the_page_of_exit_codes_has_each_of_them() -> None:
    from mthp import errors

    codes = set(re.findall(r"^\| (\d) \|", (ROOT / "docs" / "exit-codes.md").read_text(), re.MULTILINE))
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.MthpError)]
    assert {str(kind.exit_code) for kind in kinds} <= codes


def test_the_glossary_has_each_word_once_and_in_order() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    tables = [re.findall(r"^\| ([^|]+?) \| [^|]+ \|$", part, re.MULTILINE)[1:] for part in text.split("own words:")]
    words = [word.partition(" (")[0] for table in tables for word in table if not word.startswith("---")]
    assert len(set(words)) == len(words)
    for table in tables:
        lower = [word.lower() for word in table if not word.startswith("---")]
        assert lower == sorted(lower)


def test_the_modules_that_the_design_names_exist() -> None:
    package = ROOT / "src" / "mthp"
    for row in re.findall(r"^\| (`.+?) \| ", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE):
        folder = ""
        for word in re.findall(r"`([\w/]+)`", row):
            # A row names the folder once: `engine/visit`, `visited`.
            path = word if "/" in word or not folder else f"{folder}/{word}"
            folder = path.rstrip("/").rpartition("/")[0]
            assert (package / f"{path}.py").exists() or (package / path).is_dir(), word


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_keys_that_exist(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))
    figures = (ROOT / "docs" / "figures.md").read_text()
    keys = {found[1] for span in spans if (found := re.match(r"(\w+) = ", span))}
    assert {key for key in keys if not re.search(rf"^\| `{key}` \| [^|]*TOML", figures, re.MULTILINE)} == set()
    words = {span for span in spans if re.fullmatch(r"[a-z]+(_[a-z]+)+", span)}
    assert {word for word in words if word not in everything() + recorder()} == set()


def recorder() -> str:
    return (ROOT / "tests" / "vm" / "recorder.c").read_text()


@pytest.mark.skipif(shutil.which("awk") is None, reason="needs awk")
def test_other_tools_output_becomes_a_file_of_heat(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "how-to" / "heat.md").read_text()
    of_damo, of_perf = (line for line in page.splitlines() if "awk " in line)
    (tmp_path / "report").write_text("7f1c40000000-7f1c40200000(   2.000 MiB):       12\nregions: 1\n")
    subprocess.run(["sh", "-c", of_damo], cwd=tmp_path, check=True)
    heat = read_heat(tmp_path / "hot.csv")
    assert (heat.start.tolist(), heat.end.tolist(), heat.accesses.tolist()) == (
        [0x7F1C40000000],
        [0x7F1C40200000],
        [12.0],
    )
    (tmp_path / "perf").write_text("#!/bin/sh\nprintf '7f1c40000123\\n  7f1c40000456\\n'\n")
    (tmp_path / "perf").chmod(0o755)
    subprocess.run(["sh", "-c", f"PATH=.:$PATH; {of_perf}"], cwd=tmp_path, check=True)
    assert read_heat(tmp_path / "hot.csv").accesses.tolist() == [2.0]
