"""The tutorial, typed as it stands (docs/tutorial.md), and the programs of how-to pages."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import mthp
from e2e.helpers import MTHP
from targets import PAGE_SIZE, PMD_ORDER
from thp_switches import ThpSwitches

pytestmark = [pytest.mark.requires("root", "thp", "4k-pages", "pagemap_scan")]

DOCS = Path(__file__).parents[2] / "docs"
TUTORIAL = DOCS / "tutorial.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def typed() -> list[str]:
    """Return the lines that a reader types, without their prompts."""
    return [line[2:] for block in BLOCK.findall(TUTORIAL.read_text()) for line in block.splitlines()]


@pytest.mark.slow
def test_the_tutorial_does_what_it_says(tmp_path: Path, thp_switches: ThpSwitches) -> None:
    thp_switches.only("2048kB")
    command = tmp_path / "bin" / "mthp"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {shlex.join(MTHP)} "$@"\n')
    command.chmod(0o755)
    script = "set -e\ntrap 'kill $pid 2>/dev/null || :' EXIT\n" + "\n".join(typed())
    environment = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    assert "ready" in done.stdout
    assert (tmp_path / "holes.html").stat().st_size > 10_000
    # As the text says, the snapshot after the collapse has the program's memory in folios of 2M.
    kept = mthp.inspect(tmp_path / "holes.mthp")
    assert kept.anonymous.coverage.pages[PMD_ORDER] * PAGE_SIZE > 0.9 * (64 << 20), done.stdout


@pytest.mark.parametrize("page", ["policy.md", "python-buffers.md"])
def test_the_program_of_a_page_runs(page: str, tmp_path: Path, thp_switches: ThpSwitches) -> None:
    thp_switches.only("2048kB")
    (program,) = re.findall(r"^```python\n(.*?)^```$", (DOCS / "how-to" / page).read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, tmp_path / "program.py"], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search("[1-9]", done.stdout), "it prints what it found or made"
