"""What a value in the rules file may be: functions that turn it into ours, or refuse it and say what is allowed."""

from __future__ import annotations

import pwd
import re
from collections.abc import Callable
from typing import Any

from mthp.collapse.policy_lookup import policy_named
from mthp.errors import UsageError
from mthp.units import above_zero

METRICS_HOST = "127.0.0.1"
METRICS_PORT = 9464

Convert = Callable[[Any], Any]


class RefusedError(Exception):
    """A value that cannot be, and what could."""

    def __init__(self, message: str, help: str = "") -> None:
        super().__init__(message)
        self.message, self.help = message, help


def parse_endpoint(text: str) -> tuple[str, int]:
    """Read where metrics are served: ``127.0.0.1:9464``, ``:9464``, ``9464``, ``[::1]:9464``. Loopback by default.

    Raises:
        UsageError: no port, or not one that there is.
    """
    host, separator, port = text.strip().rpartition(":")
    if not separator and not port.isdecimal():
        host, port = port, str(METRICS_PORT)
    if not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise UsageError(
            f"{text[:60]!r} is not an address to serve metrics at", help="write it as 127.0.0.1:9464 or 9464"
        )
    return host.strip("[]") or METRICS_HOST, int(port)


def text(convert: Callable[[str], Any]) -> Convert:
    """A text in quotes, which `convert` then reads."""

    def converted(value: Any) -> Any:
        if not isinstance(value, str):
            raise RefusedError(f"{value!r} is not a text in quotes")
        return convert(value)

    return converted


def integer(lowest: int, highest: int | None = None) -> Convert:
    """An integer within bounds."""

    def converted(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise RefusedError(f"{value!r} is not an integer")
        if value < lowest or (highest is not None and value > highest):
            allowed = f"at least {lowest}" if highest is None else f"{lowest} to {highest}"
            raise RefusedError(f"{value} is out of range", f"it may be {allowed}")
        return value

    return converted


def positive(convert: Convert) -> Convert:
    """What `convert` reads, if it is above 0."""

    def converted(value: Any) -> Any:
        number = convert(value)
        above_zero(value, number)
        return number

    return converted


def one_of(*words: str) -> Convert:
    """One of some words."""

    def converted(value: Any) -> str:
        if value not in words:
            raise RefusedError(f"{value!r} is not known", f"it may be {', '.join(words)}")
        return str(value)

    return converted


def boolean(value: Any) -> bool:
    """true or false."""
    if not isinstance(value, bool):
        raise RefusedError(f"{value!r} is neither true nor false")
    return value


def table_itself(value: Any) -> dict[str, Any]:
    """A table, which is read later."""
    if not isinstance(value, dict):
        raise RefusedError(f"{value!r} is not a table", 'match = { comm = "redis-server", uid = 1000 }')
    return value


def policy_name(value: Any) -> str:
    """The name of a policy that there is."""
    return policy_named(text(str)(value)).name


def list_of(convert: Convert) -> Convert:
    """One value, or a list of them: a tuple."""

    def converted(value: Any) -> tuple[Any, ...]:
        values = value if isinstance(value, list) else [value]
        if not values:
            raise RefusedError("an empty list fits nobody")
        return tuple(convert(each) for each in values)

    return converted


def user_id(value: Any) -> int:
    """A user, by number or by name."""
    if not isinstance(value, str):
        return int(integer(0)(value))
    try:
        return pwd.getpwnam(value).pw_uid
    except KeyError:
        raise RefusedError(
            f"there is no user {value!r}", "give a name that getent passwd(1) knows, or a number"
        ) from None


def pattern(value: Any) -> str:
    """A shell pattern that fits something."""
    if not isinstance(value, str) or not value:
        raise RefusedError(f"{value!r} is not a pattern in quotes")
    return value


def cgroup_pattern(value: Any) -> str:
    """A pattern of paths below the root of the version 2 hierarchy."""
    given = pattern(value)
    if given.startswith("/sys/fs/cgroup/"):
        raise RefusedError(
            f"{value!r} is a path of the file system", "give the path below /sys/fs/cgroup, as in /proc/PID/cgroup"
        )
    return given if given.startswith(("/", "*")) else f"/{given}"
