"""Scenarios: what `mthp simulate` runs, as a TOML file.

    seed = 1
    duration = "60s"
    policy = "mainline"

    [machine]
    memory = "1G"
    fragmentation = "30%"

    [switches]
    enabled = "madvise"
    64K = "inherit"

    [tunables]
    max_ptes_none = 64

    [[process]]
    workload = "redis"
    memory = "400M"

    [[fault]]
    at = "30s"
    kind = "fragment"
    share = "90%"

Every table is a dataclass of :mod:`mthp.lab.tables`, and a key of the file is one of its fields; what a field is
written as, is its type (:mod:`mthp.lab.workloads.parameters`). A key that no field has, a unit that does not exist, a
number below 0 and a machine too small for its programs are errors that name the place.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from mthp.bounded import named, read_toml
from mthp.collapse.policy_lookup import policy_named
from mthp.errors import UsageError
from mthp.files import begins
from mthp.geometry import Geometry, geometry_named
from mthp.lab.feasible import check_machine, check_processes
from mthp.lab.tables import FAULTS, FaultSettings, MachineSettings, ProcessPlan, ProcessSettings, Scenario, Settings
from mthp.lab.workloads import MODELS
from mthp.lab.workloads.parameters import Size
from mthp.tunables import Switches, Tunables
from mthp.units import parse_duration, parse_share, parse_size

_T = TypeVar("_T")


def load_scenario(path: Path) -> Scenario:
    """Read and check the scenario at `path`.

    Raises:
        UsageError: it is not there, not TOML, or says something that cannot be; the message names the place.
    """
    if _is_foreign(path):
        said = 'a recording is simulated by a scenario whose process has workload = "recording" and file = "..."'
        raise UsageError(f"{path}: not TOML, and no text", help=said)
    text, data = read_toml(path)
    with named(path):
        return _scenario(path, text, data)


def _is_foreign(path: Path) -> bool:
    """Whether the file at `path` begins as no text does."""
    return begins(path, 4) in (b"PAR1", b"\xff\xff\xff\xff")


_TABLES = ("machine", "switches", "tunables", "process", "fault")


def _scenario(path: Path, text: str, data: dict[str, Any]) -> Scenario:
    settings = _made(Settings, {k: v for k, v in data.items() if k not in _TABLES}, "", path, extra=_TABLES)
    for name in ("step", "sample", "duration"):
        if not getattr(settings, name) > 0:
            raise UsageError(f"{name} is not above 0")
    policy_named(settings.policy)
    machine = _made(MachineSettings, _table(data, "machine"), "machine", path)
    geometry = geometry_named(machine.geometry)
    if machine.nodes < 1:
        raise UsageError("machine.nodes is not at least 1")
    if machine.memory // machine.nodes < geometry.pmd_size:
        raise UsageError(f"machine.memory: a node has less than one PMD range of {geometry.label(geometry.pmd_order)}")
    check_machine(machine, geometry)
    processes = tuple(_process(table, number, path) for number, table in enumerate(_tables(data, "process"), 1))
    if not processes:
        raise UsageError("it has no [[process]]", help=f"workloads are {', '.join(MODELS)}")
    check_processes(processes, machine, settings, geometry)
    faults = tuple(_fault(table, number, path, processes) for number, table in enumerate(_tables(data, "fault"), 1))
    return Scenario(
        str(path),
        text,
        settings,
        machine,
        processes,
        faults,
        geometry,
        _switches(_table(data, "switches"), geometry),
        _tunables(_table(data, "tunables"), geometry),
    )


def _process(table: Mapping[str, Any], number: int, path: Path) -> ProcessPlan:
    place = f"process {number}"
    workload = table.get("workload")
    if not isinstance(workload, str) or workload not in MODELS:
        raise UsageError(f"{place}: workload {workload!r} does not exist", help=f"use one of {', '.join(MODELS)}")
    own = {f.name for f in dataclasses.fields(ProcessSettings)}
    model_type = MODELS[workload]
    theirs = [f.name for f in dataclasses.fields(model_type)]  # type: ignore[arg-type]
    settings = _made(ProcessSettings, {k: v for k, v in table.items() if k in own}, place, path)
    model = _made(model_type, {k: v for k, v in table.items() if k not in own}, place, path, extra=own | set(theirs))
    if settings.stop and settings.stop <= settings.start:
        raise UsageError(f"{place}: it stops before it starts")
    return ProcessPlan(dataclasses.replace(settings, name=settings.name or workload), model)


def _fault(table: Mapping[str, Any], number: int, path: Path, processes: tuple[ProcessPlan, ...]) -> FaultSettings:
    place = f"fault {number}"
    fault = _made(FaultSettings, table, place, path)
    if fault.kind not in FAULTS:
        raise UsageError(f"{place}: kind {fault.kind!r} does not exist", help=f"use one of {', '.join(FAULTS)}")
    names = [process.settings.name for process in processes]
    if fault.kind != "fragment" and fault.process not in names:
        raise UsageError(f"{place}: there is no process called {fault.process!r}", help=f"there are {', '.join(names)}")
    return fault


def _switches(table: Mapping[str, Any], geometry: Geometry) -> Switches:
    default = Switches.defaults(geometry)
    sizes = dict(default.sizes)
    for key, word in table.items():
        if key != "enabled":
            try:
                sizes[geometry.parse_order(key)] = word
            except UsageError as error:
                raise UsageError(f"switches: {error.message}", help=error.help) from error
    try:
        return Switches(table.get("enabled", default.enabled), sizes)
    except UsageError as error:
        raise UsageError(f"switches: {error.message}", help=error.help) from error


def _tunables(table: Mapping[str, Any], geometry: Geometry) -> Tunables:
    known = [f.name for f in dataclasses.fields(Tunables)]
    for key in table:
        if key not in known:
            raise _unknown(f"tunables.{key}", key, known)
    try:
        return dataclasses.replace(Tunables.defaults(geometry), **table).checked(geometry)
    except UsageError as error:
        raise UsageError(f"tunables: {error.message}", help=error.help) from error


def _table(data: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = data.get(name, {})
    if not isinstance(table, dict):
        raise UsageError(f"{name} is not a table", help=f"write [{name}] on a line of its own")
    return table


def _tables(data: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    tables = data.get(name, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(f"{name} is not a list of tables", help=f"write [[{name}]] on a line of its own, for each")
    return tables


def _made(kind: type[_T], table: Mapping[str, Any], place: str, path: Path, *, extra: Any = ()) -> _T:
    """A dataclass from a table; what is missing or unknown is an error that names `place`."""
    before = f"{place}." if place else ""
    hints = get_type_hints(kind, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {}
    for key, value in table.items():
        if key not in fields:
            raise _unknown(f"{before}{key}", key, [*fields, *extra])
        values[key] = _value(value, hints[key], f"{before}{key}", path)
        # Where none is a sensible amount of memory, it is the default.
        if hints[key] == Size and values[key] == 0 and fields[key].default:
            raise UsageError(f"{before}{key} is 0", help="leave it out for the default")
    for name, each in fields.items():
        if name not in values and each.default is dataclasses.MISSING:
            raise UsageError(f"{before}{name} is missing")
    return kind(**values)


def _unknown(place: str, key: str, known: list[str]) -> UsageError:
    close = difflib.get_close_matches(key, known, 1)
    known_words = f"known are {', '.join(dict.fromkeys(known))}"
    return UsageError(f"{place} does not exist", help=f"did you mean {close[0]}?" if close else known_words)


def _value(value: Any, hint: Any, place: str, path: Path) -> Any:
    """`value` as the type `hint` wants it.

    Raises:
        UsageError: it is something else.
    """
    how = next((word for word in get_args(hint)[1:] if isinstance(word, str)), "")
    if hint is bool or hint is str:
        if not isinstance(value, hint):
            raise UsageError(f"{place} {value!r} is not {'true or false' if hint is bool else 'a text'}")
        return value
    if how == "file" and isinstance(value, str):
        return str(path.parent / value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value < 0:
        raise UsageError(f"{place} {value} is below 0")
    try:
        return _READERS[how](value)
    except UsageError as error:
        raise UsageError(f"{place}: {error.message}", help=error.help) from error


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise UsageError(f"{value!r} is not a count", help="write a whole number")
    return value


def _path(value: Any) -> str:
    raise UsageError(f"{value!r} is not a file", help="write the path of a file, as a text")


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "size": parse_size,
    "duration": lambda value: parse_duration(value, bare="s") / 1e9,
    "share": parse_share,
    "count": _count,
    "file": _path,
}
"""How a value is read, by the word in its type (:mod:`mthp.lab.workloads.parameters`)."""
