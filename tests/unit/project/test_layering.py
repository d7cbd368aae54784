"""The layers of the design hold: import-linter's contracts in ``pyproject.toml``."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")

ROOT = Path(__file__).parents[3]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"

BROKEN = """
[importlinter]
root_package = mthp

[importlinter:contract:broken]
name = geometry knows no errors
type = forbidden
source_modules = mthp.geometry
forbidden_modules = mthp.errors
"""

CIRCLE = """
[importlinter]
root_package = circle

[importlinter:contract:circle]
name = no circles
type = acyclic_siblings
ancestors = circle
"""


def lint_imports(config: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run import-linter in `root` with the contracts of `config`."""
    return subprocess.run(
        [sys.executable, "-c", LINT, "--config", str(config), "--no-cache"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_every_contract_is_kept() -> None:
    done = lint_imports(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


def test_no_command_imports_a_command() -> None:
    commands = sorted((ROOT / "src/mthp/cli").glob("*_command.py"))
    assert len(commands) > 15
    assert [
        file.name for file in commands if re.search(r"^\s*(from|import) .*_command\b", file.read_text(), re.M)
    ] == []


def test_a_contract_that_does_not_hold_is_found(tmp_path: Path) -> None:
    config = tmp_path / "importlinter.ini"
    config.write_text(BROKEN)
    done = lint_imports(config)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "mthp.geometry -> mthp.errors" in done.stdout


@pytest.mark.parametrize(
    "back",
    [
        "from circle import far",
        "def later() -> None:\n    from circle import far",
        "from typing import TYPE_CHECKING\n\nif TYPE_CHECKING:\n    from circle.far.inner import Thing",
    ],
)
def test_a_circle_of_any_kind_of_import_is_found(tmp_path: Path, back: str) -> None:
    package = tmp_path / "circle"
    (package / "far").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "far/__init__.py").touch()
    (package / "far/inner.py").write_text("from circle import near\n\nclass Thing: ...\n")
    (package / "near.py").write_text(f"{back}\n")
    (tmp_path / "importlinter.ini").write_text(CIRCLE)
    done = lint_imports(tmp_path / "importlinter.ini", tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "No cycles are allowed in circle" in done.stdout
