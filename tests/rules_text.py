"""The configuration in a text, read from a file as the daemon reads it."""

from __future__ import annotations

import tempfile
from contextlib import chdir
from pathlib import Path

from mthp.daemon.config import Configuration, load_configuration
from mthp.geometry import Geometry


def parse_configuration(text: str, geometry: Geometry) -> Configuration:
    """Return the configuration in the text of a file with the name ``rules.toml``."""
    with tempfile.TemporaryDirectory() as directory, chdir(directory):
        Path("rules.toml").write_text(text)
        return load_configuration(Path("rules.toml"), geometry)
