"""The rules file: TOML text to a :class:`Configuration`, or a refusal that names file, line, key and what is allowed.

A file is taken as a whole or not at all. Every key is checked, also in rules that never fit anybody, and an unknown key
is an error rather than nothing: a limit that was misspelled would otherwise be no limit.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from mthp.addrspace import Mechanism
from mthp.bounded import named, parse_toml, read_toml
from mthp.budget import parse_amount, parse_bloat
from mthp.daemon import values
from mthp.daemon.rules import Match, Rule, Rules, Settings
from mthp.errors import MthpError, UsageError
from mthp.geometry import Geometry
from mthp.tunables import LIMITS, SIZE_WORDS, TOP_WORDS, Switches, Tunables
from mthp.units import parse_duration, parse_rate, parse_share

Pace = Literal["cpu", "kernel"]
"""What decides how fast it goes: the CPU budget, or pages_to_scan and scan_sleep_millisecs as in the kernel."""


@dataclass(frozen=True, slots=True)
class Configuration:
    """All that the daemon is told.

    Attributes:
        rules: whom to work on, and how.
        cpu: share of one core that the daemon may use.
        bytes_per_second: bytes collapsed per second at most, in all processes together; None for no bound.
        memory_pressure: share of time that tasks wait for memory (PSI, some avg10) above which the daemon rests.
        notice_ns: within what time a new process is to be noticed, in nanoseconds.
        pace: what decides how fast it goes.
        metrics: (host, port) to serve metrics at; None for none.
        events: file of the event log; None for none.
        tunables: those of khugepaged's that are set here; the others are the system's at any moment.
        enabled, sizes: the same for the switches: the top-level word, and words by order.
    """

    rules: Rules
    cpu: float = 0.10
    bytes_per_second: int | None = None
    memory_pressure: float = 0.10
    notice_ns: int = 100_000_000
    pace: Pace = "cpu"
    metrics: tuple[str, int] | None = None
    events: Path | None = None
    tunables: Mapping[str, int] = field(default_factory=dict)
    enabled: str | None = None
    sizes: Mapping[int, str] = field(default_factory=dict)

    def tunables_over(self, system: Tunables, geometry: Geometry) -> Tunables:
        """The tunables that hold, where those of the system are `system`."""
        return system.replaced(geometry, **self.tunables) if self.tunables else system

    def switches_over(self, system: Switches) -> Switches:
        """The switches that hold, where those of the system are `system`."""
        if self.enabled is None and not self.sizes:
            return system
        return Switches(self.enabled or system.enabled, dict(system.sizes) | dict(self.sizes))


def load_configuration(path: Path, geometry: Geometry) -> Configuration:
    """Read a rules file.

    Raises:
        UsageError: it cannot be read, is no TOML, or says something that cannot be.
    """
    text, data = read_toml(path)
    return _Reader(text, str(path), geometry).configuration(data)


def parse_configuration(text: str, geometry: Geometry, name: str = "configuration") -> Configuration:
    """Read the text of a rules file.

    Args:
        name: how to call it in messages.

    Raises:
        UsageError: it is no TOML, or says something that cannot be.
    """
    with named(name):
        data = parse_toml(text)
    return _Reader(text, name, geometry).configuration(data)


def configuration_of(data: dict[str, Any], geometry: Geometry, name: str = "configuration") -> Configuration:
    """What the tables of a file mean, wherever they come from.

    Raises:
        UsageError: they say something that cannot be.
    """
    return _Reader("", name, geometry).configuration(data)


class _Reader:
    """Turns the tables of one file into values, and knows where in the file they are."""

    def __init__(self, text: str, name: str, geometry: Geometry) -> None:
        self._lines = text.splitlines()
        self._name = name
        self._geometry = geometry
        limit = values.integer(0, geometry.ptes_per_pmd - 1)
        self._settings: dict[str, tuple[str, values.Convert]] = {
            "policy": ("policy", values.policy_name),
            "orders": ("orders", self._orders),
            **{each: (each, limit) for each in LIMITS},
            "mechanism": ("mechanism", values.one_of(*get_args(Mechanism))),
            "max_pause": ("max_pause_ns", values.positive(parse_duration)),
            "pause_share": ("pause_share", values.positive(parse_share)),
            "max_bloat": ("max_bloat", parse_bloat),
            "reserve": ("reserve", parse_amount),
            "max_threads": ("max_threads", values.integer(1)),
            "rate": ("rate", parse_rate),
        }

    def configuration(self, data: dict[str, Any]) -> Configuration:
        """Read the whole file."""
        known = ("daemon", "tunables", "switches", "defaults", "rule")
        for key in data:
            if key not in known:
                self._refuse_key(key, known, "", 0)
        defaults = dataclasses.replace(Settings(), **self._table(data.get("defaults", {}), "defaults", self._settings))
        rules = self._rules(data.get("rule", []), defaults)
        enabled, sizes = self._switches(data.get("switches", {}))
        return Configuration(
            rules=self._checked_rules(rules),
            tunables=self._tunables(data.get("tunables", {})),
            enabled=enabled,
            sizes=sizes,
            **self._table(data.get("daemon", {}), "daemon", _DAEMON_KEYS),
        )

    def _rules(self, tables: Any, defaults: Settings) -> list[Rule]:
        if not isinstance(tables, list):
            raise UsageError(f"{self._at('rule', 0)}: rules are written [[rule]]")
        rules = []
        for index, table in enumerate(tables):
            if not isinstance(table, dict):
                raise UsageError(f"{self._at('rule', index)}: a rule is a table")
            found = self._table(table, "rule", _RULE_KEYS | self._settings, index)
            if "match" not in found:
                raise UsageError(
                    f"{self._at('rule', index)}: rule {index + 1} has no match",
                    help='match = { comm = "redis-server" }, or match = { pid = [...] }; match = {} fits everybody',
                )
            match = Match(**self._table(found.pop("match"), "rule.match", _MATCH_KEYS, index))
            name = found.pop("name", f"rule {index + 1}")
            deny = found.pop("deny", False)
            if deny and found:
                raise UsageError(
                    f"{self._at('rule', index)}: rule {name!r} denies, and sets {', '.join(found)} besides",
                    help="a rule that denies has nothing else to say",
                )
            rules.append(Rule(name, match, deny, dataclasses.replace(defaults, **found)))
        return rules

    def _checked_rules(self, rules: list[Rule]) -> Rules:
        try:
            return Rules(tuple(rules))
        except UsageError as error:
            raise UsageError(f"{self._name}: {error.message}", help=error.help) from None

    def _tunables(self, table: dict[str, Any]) -> dict[str, int]:
        keys = {knob.name: (knob.name, values.integer(0)) for knob in dataclasses.fields(Tunables)}
        keys |= {each: (each, values.integer(0, self._geometry.ptes_per_pmd - 1)) for each in LIMITS}
        keys["pages_to_scan"] = ("pages_to_scan", values.integer(1))
        keys["defrag"] = ("defrag", values.integer(0, 1))
        return self._table(table, "tunables", keys)

    def _switches(self, table: dict[str, Any]) -> tuple[str | None, dict[int, str]]:
        word = values.one_of(*SIZE_WORDS)
        keys = {self._geometry.label(order): (str(order), word) for order in self._geometry.anon_orders}
        keys["enabled"] = ("enabled", values.one_of(*TOP_WORDS))
        found = self._table(table, "switches", keys)
        enabled = found.pop("enabled", None)
        return enabled, {int(order): word for order, word in found.items()}

    def _table(
        self, table: Any, section: str, keys: Mapping[str, tuple[str, values.Convert]], index: int = 0
    ) -> dict[str, Any]:
        """The values of a table, under the names that `keys` gives them."""
        if not isinstance(table, dict):
            raise UsageError(f"{self._at(section, index)}: [{section}] is not a table")
        found = {}
        for key, value in table.items():
            if key not in keys:
                self._refuse_key(key, tuple(keys), section, index)
            name, convert = keys[key]
            try:
                found[name] = convert(value)
            except (MthpError, values.RefusedError) as error:
                raise UsageError(f"{self._at(section, index, key)}: {key}: {error.message}", help=error.help) from None
        return found

    def _refuse_key(self, key: str, known: tuple[str, ...], section: str, index: int) -> None:
        close = difflib.get_close_matches(key, known, n=1)
        meant = f"did you mean {close[0]!r}? " if close else ""
        where = f" in [{section}]" if section else ""
        raise UsageError(
            f"{self._at(section, index, key)}: unknown key {key!r}{where}", help=f"{meant}known are {', '.join(known)}"
        )

    def _at(self, section: str, index: int, key: str = "") -> str:
        line = _line_of(self._lines, section, index, key)
        return f"{self._name}:{line}" if line else self._name

    def _orders(self, value: Any) -> tuple[int, ...] | str:
        if value == "enabled":
            return "enabled"
        if not isinstance(value, str | list):
            raise values.RefusedError(f"{value!r} is neither a text nor a list", 'write "64K,2M", "all" or "enabled"')
        return self._geometry.parse_orders(value)


def _line_of(lines: list[str], section: str, index: int, key: str) -> int:
    """The line, from 1, of a key in the `index`-th table of a section, or of the table's beginning; 0 if not found."""
    parent = section.partition(".")[0]
    header = re.compile(rf"\s*\[+\s*{re.escape(parent)}\s*(\.[^]]*)?\]+")
    assignment = re.compile(rf"(^|.*[\s{{,.])[\"']?{re.escape(key)}[\"']?\s*=")
    seen, begun = -1, 0 if section else 1
    for number, line in enumerate(lines, 1):
        if line.lstrip().startswith("["):
            match = header.match(line)
            if key and not section and re.match(rf"\s*\[+\s*{re.escape(key)}\s*[].]", line):
                return number
            if match and not match[1]:
                seen += 1
            inside = bool(match) and seen == index
            if inside and not begun:
                begun = number
            if begun and not inside and section:
                break
        elif begun and key and assignment.match(line):
            return number
    return begun if section else 0


_RULE_KEYS: dict[str, tuple[str, values.Convert]] = {
    "name": ("name", values.text(str)),
    "deny": ("deny", values.boolean),
    "match": ("match", values.table_itself),
}

_MATCH_KEYS: dict[str, tuple[str, values.Convert]] = {
    "pid": ("pid", values.list_of(values.integer(1))),
    "uid": ("uid", values.list_of(values.user_id)),
    "comm": ("comm", values.list_of(values.pattern)),
    "exe": ("exe", values.list_of(values.pattern)),
    "cgroup": ("cgroup", values.list_of(values.cgroup_pattern)),
}

_DAEMON_KEYS: dict[str, tuple[str, values.Convert]] = {
    "cpu": ("cpu", values.positive(parse_share)),
    "bytes_per_second": ("bytes_per_second", parse_rate),
    "memory_pressure": ("memory_pressure", values.positive(parse_share)),
    "notice": ("notice_ns", values.positive(parse_duration)),
    "pace": ("pace", values.one_of(*get_args(Pace))),
    "metrics": ("metrics", values.text(values.parse_endpoint)),
    "events": ("events", values.text(Path)),
}

EXAMPLE = Path(__file__).with_name("example.toml")
"""A file that shows every key."""
