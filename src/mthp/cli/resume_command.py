"""``mthp resume``: have the running daemon go on after ``mthp pause``."""

from __future__ import annotations

from pathlib import Path

import click

from mthp.cli.asking import run_dir_option, set_paused
from mthp.cli.options import json_option


@click.command("resume")
@run_dir_option
@json_option
def command(run_dir: Path | None, as_json: bool) -> int:
    """Let the running daemon continue after `mthp pause`."""
    return set_paused("resume", run_dir, as_json)
