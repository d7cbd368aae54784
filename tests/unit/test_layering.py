"""The layers of the design hold: import-linter's contracts in ``pyproject.toml``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter")

ROOT = Path(__file__).parents[2]
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


def lint_imports(config: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter with the contracts of `config`."""
    return subprocess.run(
        [sys.executable, "-c", LINT, "--config", str(config), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_every_contract_is_kept() -> None:
    done = lint_imports(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


def test_a_contract_that_does_not_hold_is_found(tmp_path: Path) -> None:
    config = tmp_path / "importlinter.ini"
    config.write_text(BROKEN)
    done = lint_imports(config)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "mthp.geometry -> mthp.errors" in done.stdout
