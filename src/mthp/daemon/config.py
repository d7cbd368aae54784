"""The rules files: TOML to a :class:`Configuration`, or a refusal that names each line, key and allowed value.

Files are accepted as a whole or not at all, and every key is checked, also in rules that fit no process.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from mthp.bounded import named
from mthp.daemon.rules import Limit, Rule, RuleSet, Settings
from mthp.errors import UsageError
from mthp.geometry import X86_64, Geometry
from mthp.naming import Match
from mthp.toml import Reader, TomlDocument, flag, positive, readers_of, text, whole
from mthp.tomlexample import attributes, commented, table_text, values_text
from mthp.tomllines import Place
from mthp.tunables import LIMITS, Switches, Tunables, read_switches, read_tunables
from mthp.units import parse_duration, parse_rate, parse_share

Pace = Literal["cpu", "kernel"]
"""The pace of the daemon: the CPU budget, or pages_to_scan and scan_sleep_millisecs as in the kernel."""


@dataclass(frozen=True, slots=True)
class Own:
    """The table ``[daemon]``: settings of the daemon itself.

    Attributes:
        cpu: share of one core that its work on processes may use.
        bytes_per_second: bytes collapsed per second at most, in all processes together; not set (None): no bound.
        max_memory_pressure: the daemon rests while tasks wait for memory for more of the time (some avg10 of
            /proc/pressure/memory).
        notice_ns: a new process is noticed within this time.
        keep_max_ptes_none: the system's max_ptes_none while the daemon runs, put back however the daemon ends: with a
            larger value the kernel's khugepaged makes huge folios of small ones. Every program sees it; the daemon
            itself uses the value from before. Not set (None): the system's.
        pace: limit of its speed: "cpu", the CPU budget, or "kernel", pages_to_scan PTEs and then scan_sleep_millisecs,
            whatever the CPU budget.
        metrics: host and port to serve Prometheus metrics at; not set (None): none are served.
        events: file of the event log; not set (None): none is written.
    """

    cpu: Annotated[float, positive(parse_share)] = 0.10
    bytes_per_second: Annotated[int, parse_rate] | None = None
    max_memory_pressure: Annotated[float, positive(parse_share)] = 0.10
    notice_ns: Annotated[int, positive(parse_duration)] = 100_000_000
    keep_max_ptes_none: Limit | None = None
    pace: Pace = "cpu"
    metrics: Annotated[tuple[str, int], parse_endpoint] | None = None
    events: Annotated[Path, file_path] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Configuration(Own):
    """The contents of a rules file.

    Attributes:
        rules: processes to work on, and how.
        tunables: those of khugepaged's that are set here; the others are the system's current ones.
        enabled, sizes: the same for the switches: the top-level word, and words by order.
    """

    rules: RuleSet
    tunables: Mapping[str, int] = field(default_factory=dict)
    enabled: str | None = None
    sizes: Mapping[int, str] = field(default_factory=dict)

    def tunables_over(self, system: Tunables, geometry: Geometry) -> Tunables:
        """Return the effective tunables, where those of the system are `system`."""
        return system.replaced(geometry, **self.tunables) if self.tunables else system

    def switches_over(self, system: Switches) -> Switches:
        """Return the effective switches, where those of the system are `system`."""
        if self.enabled is None and not self.sizes:
            return system
        return Switches(self.enabled or system.enabled, dict(system.sizes) | dict(self.sizes))


def example() -> str:
    """Return a rules file with every key at its default value."""
    defaults = Tunables.defaults(X86_64)
    switches = Switches.defaults(X86_64)
    words = {"enabled": switches.enabled, **switches.words_by_size(X86_64)}
    return "\n".join(
        [
            commented(_ABOVE),
            table_text(Own, "[daemon]", examples=_OWN),
            values_text("[tunables]", dataclasses.asdict(defaults) | {"defrag": 1}, attributes(Tunables)),
            values_text("[switches]", words, attributes(Switches)),
            table_text(Settings, "[defaults]", examples=_SETTINGS),
            commented(_RULES),
            _THREE_RULES,
        ]
    )


_ABOVE = """\
Configuration of mthp daemon. It reads /etc/mthp/mthp.toml and then /etc/mthp/conf.d/*.toml, or the path of --config.
Every key is shown; a key in a comment has its default value, or an example if it has none. SIGHUP (systemctl reload
mthp) makes the daemon read the files again; if one has an error, all are refused, and the old configuration stays in
force. Rules may be in any of the files, and any other key in one of them. Without [tunables] and [switches] the daemon
follows those of the system, /sys/kernel/mm/transparent_hugepage, at any moment; the values below are a kernel's own.
[defaults] holds for all rules that set nothing else.
"""

_RULES = """\
Rules. All properties of match must fit; several values mean any of them. Patterns are the shell's. Of the rules that
fit, one that denies wins, then the most specific: pid before exe before comm before container before pod before unit
before cgroup before uid. A unit is systemd's (unit = "redis"), a pod is Kubernetes' (pod = "shop/redis-*"), a container
is named by the beginning of its ID. match = {} fits every process. A rule may have every key of [defaults].
"""

_THREE_RULES = """\
[[rule]]
name = "databases"
match = { comm = ["redis-server", "postgres", "mysqld"] }
orders = "64K,2M"

[[rule]]
name = "everything in the service slice"
match = { cgroup = "/system.slice/*" }
max_pause = "500us"

[[rule]]
name = "not these"
match = { exe = "/usr/bin/qemu-system-*" }
deny = true
"""

_OWN = {
    "bytes_per_second": "2G",
    "keep_max_ptes_none": 0,
    "metrics": "127.0.0.1:9464",
    "events": "/var/log/mthp/events.jsonl",
}
_SETTINGS = {
    **{name: getattr(Tunables.defaults(X86_64), name) for name in LIMITS},
    "reserve": "256M",
    "max_threads": 1666,
    "eagerness": 5,
    "rate": "500M",
    "trim": "50%",
    "heat": "5s",
}
"""Examples of keys that are not set by default."""


def configuration_files(path: Path) -> list[Path]:
    """Return the files of the configuration at `path`.

    A file is all of it. A directory has `mthp.toml`, and the files of `conf.d` that end with .toml, ordered by name.

    Raises:
        UsageError: the directory has no such file, or cannot be read.
    """
    more = path / "conf.d"
    try:
        if not path.is_dir():
            return [path]
        found = sorted(more.iterdir()) if more.is_dir() else []
        main = [path / MAIN] if (path / MAIN).exists() else []
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", help="run as root") from error
    # Without hidden files, which editors write.
    found = main + [file for file in found if file.suffix == ".toml" and not file.name.startswith(".")]
    if not found:
        raise UsageError(f"{path} has neither {MAIN} nor conf.d/*.toml", help=_MAKE_ONE.format(path / MAIN))
    return found


DIRECTORY = Path("/etc/mthp")
"""Directory of the configuration if no option names one."""

MAIN = "mthp.toml"

_MAKE_ONE = "write one: mthp daemon --print-config > {}"


def load_configuration(path: Path, geometry: Geometry) -> Configuration:
    """Return the configuration of a rules file, or of a directory of such files.

    The rules of all files apply. Each key of the other tables may be set in one of the files, and applies to all.

    Raises:
        UsageError: a file cannot be read, is not TOML, or has an invalid value; or a key is set twice.
    """
    paths = configuration_files(path)
    return _configuration([TomlDocument.load(each, _readers(geometry)) for each in paths], geometry, str(path))


def configuration_of(data: dict[str, Any], geometry: Geometry, name: str = "configuration") -> Configuration:
    """Return the configuration in the tables of a file, or in equal tables from elsewhere.

    Raises:
        UsageError: a value is invalid.
    """
    return _configuration([TomlDocument("", data, name, _readers(geometry))], geometry, name)


def _readers(geometry: Geometry) -> dict[str, Reader]:
    def orders(value: Any) -> tuple[int, ...] | str:
        if value == "enabled":
            return "enabled"
        return geometry.parse_orders([text(each) for each in value] if isinstance(value, list) else text(value))

    return {"orders": orders, "limit": whole(0, geometry.ptes_per_pmd - 1)}


def _configuration(documents: Sequence[TomlDocument], geometry: Geometry, name: str) -> Configuration:
    defaults: dict[str, Any] = {}
    own: dict[str, Any] = {}
    tunables: dict[str, int] = {}
    sizes: dict[int, str] = {}
    enabled: str | None = None
    for document in documents:
        # No key stands outside of the tables.
        document.values((), {}, beside=(*_TABLES, "rule"))
        defaults |= document.values(("defaults",), readers_of(Settings))
        own |= document.values(("daemon",), readers_of(Own))
        tunables |= read_tunables(document, geometry)
        word, words = read_switches(document, geometry)
        enabled, sizes = word or enabled, sizes | words
    _refuse_doubles(documents, geometry)
    settings = Settings(**defaults)
    rules = [_rule(document, place, settings) for document in documents for place in document.tables("rule")]
    # Only now, so that all errors of a file are reported together.
    for document in documents:
        document.check()
    with named(name):
        return Configuration(rules=RuleSet(tuple(rules)), tunables=tunables, enabled=enabled, sizes=sizes, **own)


_TABLES = ("daemon", "tunables", "switches", "defaults")


def _refuse_doubles(documents: Sequence[TomlDocument], geometry: Geometry) -> None:
    """Record an error for every key that two files set."""
    first: dict[tuple[str, str | int], tuple[TomlDocument, str]] = {}
    for document in documents:
        for table in _TABLES:
            for key in document.keys(table):
                known: str | int = key
                if table == "switches":
                    # A size may be written in several ways.
                    with suppress(UsageError):
                        known = geometry.parse_order(key)
                other, written = first.setdefault((table, known), (document, key))
                if other is not document:
                    twice = f"is set twice: {other.where(table, written)} sets it, too"
                    document.refuse((table, key), twice, help="remove one of them")


def _rule(document: TomlDocument, place: Place, defaults: Settings) -> Rule:
    number = int(place[-1]) + 1
    keys: dict[str, tuple[str, Reader | str]] = {
        "name": ("name", text),
        "deny": ("deny", flag),
        # Only whether it is set; it is read as a table below.
        "match": ("match", lambda value: value),
    }
    found = document.values(place, keys | readers_of(Settings))
    if found.pop("match", None) is None:
        document.refuse(
            place,
            "has no match",
            help='write match = { comm = "redis-server" } or match = { pid = [...] }; match = {} fits every process',
        )
    match = document.table(Match, *place, "match") or Match()
    rule_name = found.pop("name", f"rule {number}")
    deny = found.pop("deny", False)
    if deny and found:
        document.refuse(place, f"denies, and sets {', '.join(found)}", help="remove these keys, or deny")
    settings = dataclasses.replace(defaults, **found)
    if settings.small and not deny and "move" not in settings.mechanism:
        document.refuse(
            place,
            f"has small, which the mechanism {settings.mechanism} does not make",
            help='set mechanism = "move" or "madvise,move"; both inject code into the process',
        )
    return Rule(rule_name, match, deny, settings)


METRICS_HOST = "127.0.0.1"
METRICS_PORT = 9464


def parse_endpoint(value: object) -> tuple[str, int]:
    """Return host and port of ``127.0.0.1:9464``, ``:9464``, ``9464`` or ``[::1]:9464``. Loopback by default.

    Raises:
        UsageError: not a port, or not a valid one.
    """
    written = text(value)
    # The last colon, because an IPv6 address has others.
    host, separator, port = written.strip().rpartition(":")
    # A host alone.
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
