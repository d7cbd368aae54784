"""Scenarios of `mthp simulate`, as TOML files.

Every table is a dataclass of :mod:`mthp.lab.scenariotables`, which :mod:`mthp.toml` reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mthp.bounded import named
from mthp.errors import UsageError
from mthp.files import begins
from mthp.geometry import geometry_named
from mthp.lab.feasible import check_machine, check_processes, check_trims
from mthp.lab.scenariotables import (
    FaultSettings,
    MachineSettings,
    ProcessPlan,
    ProcessSettings,
    Scenario,
    TopLevelKeys,
    TrimSettings,
)
from mthp.lab.workloads import MODELS
from mthp.toml import TomlDocument, readers_of, text
from mthp.tomlexample import attributes, commented, summary, table_text, values_text
from mthp.tomllines import Place
from mthp.tunables import Switches, Tunables, read_switches, read_tunables


def example() -> str:
    """Return the text of a scenario with every key and its default."""
    machine = MachineSettings()
    geometry = geometry_named(machine.geometry)
    switches, tunables = Switches.defaults(geometry), Tunables.defaults(geometry)
    words = {"enabled": switches.enabled, **switches.words_by_size(geometry)}
    first, *others = (_process_text(name) for name in MODELS)
    return "\n".join(
        [
            commented(_ABOVE) + table_text(TopLevelKeys, "", examples={"duration": "60s"}),
            table_text(MachineSettings, "[machine]"),
            values_text("[switches]", words, attributes(Switches)),
            values_text("[tunables]", dataclasses.asdict(tunables) | {"defrag": 1}, attributes(Tunables)),
            first,
            commented("Each workload has keys of its own:"),
            *others,
            commented(summary(FaultSettings))
            + table_text(FaultSettings, "[[fault]]", examples={"at": "30s", "kind": "fragment"}, optional=True),
            commented(summary(TrimSettings))
            + table_text(TrimSettings, "[trim]", examples={"every": "10s"}, optional=True),
        ]
    )


_ABOVE = """\
A scenario for mthp simulate FILE: programs and khugepaged on a simulated machine. Every key is shown; a key in a
comment has its default value. The values of [switches] and [tunables] are those of the geometry x86-64.
"""


def _process_text(workload: str) -> str:
    """Return the text of a process with every key of its workload; a comment, except for the first workload."""
    model, optional = MODELS[workload], workload != next(iter(MODELS))
    ours = "" if optional else table_text(ProcessSettings, "[[process]]", examples={"workload": workload})
    header, keys = ("[[process]]", f'# workload = "{workload}"') if optional else ("", "")
    theirs = table_text(model, header, examples={"file": "redis.mthp"}, optional=optional, keys=keys)
    return commented(summary(model)) + ours + theirs


def load_scenario(path: Path) -> Scenario:
    """Return the scenario at `path`, checked.

    Raises:
        UsageError: the file does not exist, is not TOML, or has an impossible value; the message names the place.
    """
    if _is_foreign(path):
        remedy = (
            'write a scenario with a process that has workload = "recording" and file = "..." to simulate a recording'
        )
        raise UsageError(f"{path}: not TOML, and not text", help=remedy)
    # Files are relative to the scenario.
    return _scenario(TomlDocument.load(path, {"file": lambda value: str(path.parent / text(value))}), path)


def _is_foreign(path: Path) -> bool:
    """Return whether the file at `path` begins as a Parquet file or one of mthp's, not as text."""
    # Parquet, a plain snapshot or recording, and an Arrow stream (its continuation mark).
    return begins(path, 4) in (b"PAR1", b"mthp", b"\xff\xff\xff\xff")


_TABLES = ("machine", "switches", "tunables", "process", "fault", "trim")


def _scenario(document: TomlDocument, path: Path) -> Scenario:
    settings = document.table(TopLevelKeys, beside=_TABLES)
    machine = document.table(MachineSettings, "machine") or MachineSettings()
    trim = document.table(TrimSettings, "trim") if document.value("trim") is not None else None
    geometry, default = geometry_named(machine.geometry), Switches.defaults(geometry_named(machine.geometry))
    processes = [process for place in document.tables("process") if (process := _process(document, place))]
    if not document.value("process"):
        document.refuse((), "it has no [[process]]", help=f"workloads are {', '.join(MODELS)}")
    # The name of an invalid process is unknown.
    names = None if document.refused("process") else [process.settings.name for process in processes]
    faults = [fault for place in document.tables("fault") if (fault := _fault(document, place, names))]
    tunables: dict[str, int] = {}
    enabled: str | None = None
    sizes: dict[int, str] = {}
    # Limits and sizes depend on the geometry.
    if not document.refused("machine", "geometry"):
        tunables = read_tunables(document, geometry)
        enabled, sizes = read_switches(document, geometry)
    if machine.memory // machine.nodes < geometry.pmd_size:
        pmd = geometry.label(geometry.pmd_order)
        document.refuse(("machine", "memory"), f"is less than one PMD range of {pmd} for each node")
    with document.at("machine"):
        check_machine(machine, geometry)
    # All refusals so far at once. The following needs valid tables.
    document.check()
    assert settings is not None
    with named(path):
        check_processes(processes, machine, settings, geometry)
        check_trims(trim, settings)
    return Scenario(
        str(path),
        document.text,
        settings,
        machine,
        tuple(processes),
        tuple(faults),
        geometry,
        Switches(enabled or default.enabled, {**default.sizes, **sizes}),
        Tunables.defaults(geometry).replaced(geometry, **tunables),
        trim,
    )


def _process(document: TomlDocument, place: Place) -> ProcessPlan | None:
    model = MODELS.get(str(document.value(*place, "workload")))
    theirs = () if model is None else tuple(readers_of(model))
    settings = document.table(ProcessSettings, *place, beside=theirs)
    if model is None or settings is None:
        return None
    parameters = document.table(model, *place, beside=tuple(readers_of(ProcessSettings)))
    if settings.stop and settings.stop <= settings.start:
        document.refuse(place, "stops before it starts")
    if parameters is None:
        return None
    return ProcessPlan(dataclasses.replace(settings, name=settings.name or settings.workload), parameters)


def _fault(document: TomlDocument, place: Place, names: Sequence[str] | None) -> FaultSettings | None:
    fault = document.table(FaultSettings, *place)
    if fault and fault.kind != "fragment" and names is not None and fault.process not in names:
        called = f"names a process that does not exist: {fault.process!r}"
        document.refuse((*place, "process"), called, help=f"use {', '.join(names)}")
    return fault
