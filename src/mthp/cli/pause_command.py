"""``mthp pause``: have the running daemon begin nothing more, until ``mthp resume``."""

from __future__ import annotations

from pathlib import Path

import click

from mthp.cli.asking import run_dir_option, set_paused
from mthp.cli.options import json_option


@click.command("pause")
@run_dir_option
@json_option
def command(run_dir: Path | None, as_json: bool) -> int:
    """Stop the running daemon from working on processes until `mthp resume`. It still finds new ones.

    When this returns, the daemon is at rest.
    """
    return set_paused("pause", run_dir, as_json)
