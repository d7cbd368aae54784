"""Values of the rules file that only the daemon uses: the address of metrics, and files."""

from __future__ import annotations

import re
from pathlib import Path

from mthp.errors import UsageError
from mthp.toml import text

METRICS_HOST = "127.0.0.1"
METRICS_PORT = 9464


def parse_endpoint(value: object) -> tuple[str, int]:
    """Return host and port of ``127.0.0.1:9464``, ``:9464``, ``9464`` or ``[::1]:9464``. Loopback by default.

    Raises:
        UsageError: not a port, or not a valid one.
    """
    written = text(value)
    host, separator, port = written.strip().rpartition(":")
    if not separator and not port.isdecimal():
        host, port = port, str(METRICS_PORT)
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UsageError(
            f"{written[:60]!r} is not an address to serve metrics at", help="write it as 127.0.0.1:9464 or 9464"
        )
    return host.strip("[]") or METRICS_HOST, int(port)


def file_path(value: object) -> Path:
    """Return the path of a file."""
    return Path(text(value))
