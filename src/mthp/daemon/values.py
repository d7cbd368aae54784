"""Values of the rules file that only the daemon knows: where to serve metrics, users, patterns."""

from __future__ import annotations

import pwd
import re
from pathlib import Path
from typing import Any

from mthp.errors import UsageError
from mthp.toml import text, whole

METRICS_HOST = "127.0.0.1"
METRICS_PORT = 9464


def parse_endpoint(value: object) -> tuple[str, int]:
    """Read where metrics are served: ``127.0.0.1:9464``, ``:9464``, ``9464``, ``[::1]:9464``. Loopback by default.

    Raises:
        UsageError: no port, or not one that there is.
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
    """Read the path of a file."""
    return Path(text(value))


def user_id(value: Any) -> int:
    """Return the number of a user, who is written as a number or a name.

    Raises:
        UsageError: there is no user of that name.
    """
    if not isinstance(value, str):
        return int(whole()(value))
    try:
        return pwd.getpwnam(value).pw_uid
    except (KeyError, ValueError):
        raise UsageError(
            f"there is no user {value[:60]!r}", help="use a name that getent passwd(1) knows, or a number"
        ) from None


def pattern(value: Any) -> str:
    """Read a shell pattern that fits something.

    Raises:
        UsageError: not a text, or empty.
    """
    if not text(value):
        raise UsageError("an empty pattern fits no process", help='use "*" for every process')
    return str(value)


def cgroup_pattern(value: Any) -> str:
    """Read a pattern of paths below the root of the version 2 hierarchy.

    Raises:
        UsageError: as :func:`pattern`, or a path of the file system.
    """
    given = pattern(value)
    if given.startswith("/sys/fs/cgroup/"):
        raise UsageError(
            f"{given[:60]!r} is a path of the file system",
            help="write the path below /sys/fs/cgroup, as in /proc/PID/cgroup",
        )
    return given if given.startswith(("/", "*")) else f"/{given}"
