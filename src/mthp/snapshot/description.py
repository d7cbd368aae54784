"""The description of a snapshot: mappings, the machine's settings, time and place of recording.

It is one JSON object in the Parquet file's key-value metadata, under :data:`KEY`. Any Parquet reader shows it, and
the runs next to it are an ordinary table. It does not contain memory contents, environment or command-line arguments.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import ClassVar, TypeVar

import numpy as np

from mthp.bounded import parse_json
from mthp.errors import UsageError
from mthp.geometry import GEOMETRIES, Geometry
from mthp.heat import Heat
from mthp.ptes import Pte
from mthp.snapshot.bounds import HEAT_SPANS, MAPPINGS, PAGES, TEXT
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma, VmaKind

KEY = "mthp.snapshot"
VERSION = 1
SCHEMA = "mthp.snapshot-file/1"

STATE_BITS: Mapping[str, int] = {bit.name: bit.value for bit in Pte if bit.name}
"""The bits of the `state` column in this version, by name."""

ADDRESS_LIMIT = 1 << 64
PAGE_SIZE_LIMIT = 1 << 24

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """Summary of a snapshot.

    Attributes:
        path: path of the file.
        label: the recorded process, for example ``"1234 (redis-server)"``.
        kernel: release of its kernel.
        recorded_at: when the recording began: UTC, ISO 8601.
        vmas: number of mappings.
        pages: base pages that are not none.
        runs: rows of the file.
        bytes: size of the file.
        version: version of the format.
    """

    JSON: ClassVar = "path target=label kernel recorded_at vmas pages runs bytes version"

    path: str
    label: str
    kernel: str
    recorded_at: str
    vmas: int
    pages: int
    runs: int
    bytes: int
    version: int = VERSION


@dataclass(frozen=True, slots=True)
class Description:
    """The JSON object as a value.

    Fields are those of :class:`~mthp.addrspace.AddressSpace` if they share a name.

    Attributes:
        recorded_at: UTC, ISO 8601.
        pages: base pages in all runs together.
        service: pod, container or service of the process; ``""`` if the file has none.
        state_bits: bits of the `state` column by name, as in the file.
        heat: memory that the target used when it was recorded; None if that was not measured.
    """

    label: str
    kernel: str
    recorded_at: str
    geometry: Geometry
    switches: Switches
    tunables: Tunables
    thp_disabled: bool
    missing: tuple[str, ...]
    vmas: tuple[Vma, ...]
    pages: int
    state_bits: Mapping[str, int] = dataclasses.field(default_factory=lambda: STATE_BITS)
    service: str = ""
    heat: Heat | None = None

    def info(self, path: str, runs: int, bytes: int) -> SnapshotInfo:
        """Return the summary of the file at `path`, with its number of `runs` and of `bytes`."""
        return SnapshotInfo(path, self.label, self.kernel, self.recorded_at, len(self.vmas), self.pages, runs, bytes)

    def to_json(self) -> str:
        """Return the text for :meth:`from_json`, in ASCII: names that are not UTF-8 keep surrogates as escapes."""
        return json.dumps(
            {
                "version": VERSION,
                "schema": SCHEMA,
                "recorded_at": self.recorded_at,
                "label": self.label,
                "service": self.service,
                "kernel": self.kernel,
                "geometry": dataclasses.asdict(self.geometry),
                "switches": {
                    "enabled": self.switches.enabled,
                    "sizes": {str(order): word for order, word in self.switches.sizes.items()},
                },
                "tunables": dataclasses.asdict(self.tunables),
                "thp_disabled": self.thp_disabled,
                "missing": list(self.missing),
                "pages": self.pages,
                "state_bits": dict(self.state_bits),
                "vmas": [vma_to_json(vma) for vma in self.vmas],
            }
            | ({} if self.heat is None else {"heat": _heat_to_json(self.heat)}),
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: bytes | str) -> Description:
        """Read and check the description of a file.

        Raises:
            UsageError: it has a newer version, or a value is missing, of the wrong type or contradictory.
        """
        try:
            data = parse_json(text)
        except UsageError as error:
            raise UsageError(f"damaged: its description: {error.message}", help=error.help) from None
        if not isinstance(data, dict):
            raise UsageError("damaged: its description is not a JSON object")
        return cls.from_data(data)

    @classmethod
    def from_data(cls, data: Mapping[str, object]) -> Description:
        """Check the description in the JSON object `data`.

        Raises:
            UsageError: see :meth:`from_json`.
        """
        _check_version(data)
        geometry = _geometry(_get(data, "geometry", dict))
        return cls(
            label=_get(data, "label", str),
            kernel=_get(data, "kernel", str),
            recorded_at=_time(_get(data, "recorded_at", str)),
            geometry=geometry,
            switches=_switches(_get(data, "switches", dict), geometry),
            tunables=_tunables(_get(data, "tunables", dict), geometry),
            thp_disabled=_get(data, "thp_disabled", bool),
            missing=_strings(_get(data, "missing", list), "missing"),
            vmas=_vmas(_get(data, "vmas", list), geometry),
            pages=_pages(_get(data, "pages", int)),
            state_bits=_state_bits(_get(data, "state_bits", dict)),
            # Files of earlier versions of mthp have neither this nor heat.
            service=_get(data, "service", str) if "service" in data else "",
            heat=None if data.get("heat") is None else _heat(_get(data, "heat", dict)),
        )


def _get(data: Mapping[str, object], key: str, kind: type[_T]) -> _T:
    value = data.get(key)
    # In Python, JSON's true is an int.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _damaged(key)
    if isinstance(value, str):
        TEXT.check(len(value))
    return value


def _pages(count: int) -> int:
    if count < 0:
        raise _damaged("pages")
    PAGES.check(count)
    return count


def _damaged(what: str) -> UsageError:
    return UsageError(f"damaged: {what!r} in its description is missing or not valid")


def _strings(values: list[object], what: str) -> tuple[str, ...]:
    strings = tuple(value for value in values if isinstance(value, str))
    if len(strings) != len(values):
        raise _damaged(what)
    return strings


def _check_version(data: Mapping[str, object]) -> None:
    version = _get(data, "version", int)
    # It counts only changes that an older reader would misunderstand: unknown keys are ignored, and need no new
    # version.
    if version > VERSION:
        raise UsageError(
            f"made by a newer mthp: its format is version {version}, this mthp reads version {VERSION}",
            help="update: pip install --upgrade 'mthp[snapshot]'",
        )
    if version < 1 or _get(data, "schema", str) != SCHEMA:
        raise _damaged("schema")


def _heat_to_json(heat: Heat) -> dict[str, object]:
    # As many spans as readers accept.
    heat = heat.coarser(HEAT_SPANS.most)
    return {
        "source": heat.source,
        "seconds": heat.seconds,
        "cpu_seconds": heat.cpu_seconds,
        "remark": heat.remark,
        "start": heat.start.tolist(),
        "end": heat.end.tolist(),
        "accesses": heat.accesses.tolist(),
    }


def _heat(data: Mapping[str, object]) -> Heat:
    columns = [_get(data, name, list) for name in ("start", "end", "accesses")]
    HEAT_SPANS.check(max(len(column) for column in columns))
    if len({len(column) for column in columns}) != 1:
        raise _damaged("heat")
    for start, end, accesses in zip(*columns, strict=True):
        # type() and not isinstance(): in Python, JSON's true is an int.
        whole = type(start) is int and type(end) is int and 0 <= start < end < ADDRESS_LIMIT
        # Also false for NaN, which json.loads() accepts.
        if not (whole and type(accesses) in (int, float) and 0 <= accesses < 1 << 62):
            raise _damaged("heat")
    return Heat.of_spans(
        np.array(columns[0], np.uint64),
        np.array(columns[1], np.uint64),
        np.array(columns[2], np.float64),
        source=_get(data, "source", str),
        seconds=_seconds(data, "seconds"),
        cpu_seconds=_seconds(data, "cpu_seconds"),
        remark=_get(data, "remark", str),
    )


def _seconds(data: Mapping[str, object], key: str) -> float:
    value = data.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _damaged("heat")
    return value


def _time(text: str) -> str:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        raise _damaged("recorded_at") from None
    return text


def _geometry(data: Mapping[str, object]) -> Geometry:
    """Return the recorded geometry. Its numbers decide; a known name must stand for the same numbers."""
    name, page_size, pmd_order = _get(data, "name", str), _get(data, "page_size", int), _get(data, "pmd_order", int)
    if page_size > PAGE_SIZE_LIMIT:
        raise _damaged("page_size")
    try:
        geometry = Geometry(name, page_size, pmd_order)
    except UsageError as error:
        raise UsageError(f"damaged: unknown geometry {name!r}: {error.message}") from None
    # A recording may come from a machine without a preset, but a preset's name must not lie.
    if GEOMETRIES.get(name, geometry) != geometry:
        raise UsageError(f"damaged: unknown geometry: {name!r} with {page_size}-byte pages and PMD order {pmd_order}")
    return geometry


def _switches(data: Mapping[str, object], geometry: Geometry) -> Switches:
    words = _get(data, "sizes", dict)
    try:
        # JSON has texts only as keys.
        sizes = {int(order): word for order, word in words.items()}
        if not all(0 < order <= geometry.pmd_order for order in sizes):
            raise _damaged("switches")
        return Switches(_get(data, "enabled", str), sizes)
    except (ValueError, TypeError):
        raise _damaged("switches") from None


def _tunables(data: Mapping[str, object], geometry: Geometry) -> Tunables:
    numbers = {knob.name: _get(data, knob.name, int) for knob in dataclasses.fields(Tunables) if knob.name != "defrag"}
    try:
        return Tunables(**numbers, defrag=_get(data, "defrag", bool)).checked(geometry)
    except UsageError as error:
        raise UsageError(f"damaged: {error.message}") from None


def _state_bits(data: Mapping[str, object]) -> dict[str, int]:
    # Readers find bits by name, and drop those with unknown names: so the numbers may change.
    bits = {name: _get(data, name, int) for name in data}
    if len(set(bits.values())) != len(bits) or not set(bits.values()) <= {1 << shift for shift in range(16)}:
        raise _damaged("state_bits")
    return bits


def _vmas(items: list[object], geometry: Geometry) -> tuple[Vma, ...]:
    """Return the mapping table, checked to ascend without overlap and to consist of whole pages."""
    MAPPINGS.check(len(items))
    vmas = tuple(_vma_from_json(item) for item in items)
    end = 0
    for vma in vmas:
        if not end <= vma.start < vma.end < ADDRESS_LIMIT or (vma.start | vma.end) % geometry.page_size:
            raise UsageError(f"damaged: the mapping at {vma.start:#x} has no whole pages or overlaps another")
        end = vma.end
    return vmas


def vma_to_json(vma: Vma) -> dict[str, object]:
    """Return a mapping as an entry of ``vmas``."""
    return {
        "start": vma.start,
        "end": vma.end,
        "permissions": vma.permissions,
        "name": vma.name,
        "kind": vma.kind.value,
        "offset": vma.offset,
        "flags": sorted(vma.flags),
        "has_anon_vma": vma.has_anon_vma,
        "node_pages": [list(pair) for pair in vma.node_pages],
    }


def _vma_from_json(item: object) -> Vma:
    if not isinstance(item, dict):
        raise _damaged("vmas")
    try:
        kind = VmaKind(_get(item, "kind", str))
    except ValueError:
        raise _damaged("kind") from None
    return Vma(
        start=_get(item, "start", int),
        end=_get(item, "end", int),
        permissions=_get(item, "permissions", str),
        name=_get(item, "name", str),
        kind=kind,
        offset=_get(item, "offset", int),
        flags=frozenset(_strings(_get(item, "flags", list), "flags")),
        has_anon_vma=None if item.get("has_anon_vma") is None else _get(item, "has_anon_vma", bool),
        node_pages=tuple(_node_pages(pair) for pair in _get(item, "node_pages", list)),
    )


def _node_pages(pair: object) -> tuple[int, int]:
    match pair:
        case [int(node), int(pages)]:
            return node, pages
    raise _damaged("node_pages")
