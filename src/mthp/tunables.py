"""khugepaged's tunables and the per-size switches: their ranges, their defaults, and their form in sysfs.

:class:`Tunables` are the files of ``/sys/kernel/mm/transparent_hugepage/khugepaged/``; :class:`Switches` are
``enabled`` beside it and ``hugepages-<size>kB/enabled`` below it. Both are plain values from any source (a live sysfs,
a snapshot, a simulated machine, the command line). Kernels differ in the files that they have, so nothing expects a
fixed set of sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Integral
from typing import ClassVar

from mthp.errors import UsageError
from mthp.geometry import MIN_ANON_ORDER, Geometry
from mthp.toml import TomlDocument, one_of, whole

TOP_WORDS = ("always", "madvise", "never")
"""Words of the top-level ``enabled`` file."""

SIZE_WORDS = ("always", "inherit", "madvise", "never")
"""Words of a per-size ``enabled`` file."""


@dataclass(frozen=True, slots=True)
class Tunables:
    """khugepaged's limits and pace, under the kernel's own names.

    Attributes:
        max_ptes_none: none or zero PTEs that a collapse may fill, per PMD range.
        max_ptes_swap: swapped-out PTEs that it may read back, per PMD range.
        max_ptes_shared: pages also mapped by another process that it may copy, per PMD range.
        pages_to_scan: PTEs scanned in one pass.
        scan_sleep_millisecs: rest between passes.
        alloc_sleep_millisecs: rest after a failed allocation.
        defrag: whether an allocation may compact and reclaim.
    """

    max_ptes_none: int
    max_ptes_swap: int
    max_ptes_shared: int
    pages_to_scan: int
    scan_sleep_millisecs: int = 10_000
    alloc_sleep_millisecs: int = 60_000
    defrag: bool = True

    @classmethod
    def defaults(cls, geometry: Geometry) -> Tunables:
        """Return the initial tunables of a kernel of this geometry (khugepaged_init(), mm/khugepaged.c)."""
        n = geometry.ptes_per_pmd
        return cls(max_ptes_none=n - 1, max_ptes_swap=n // 8, max_ptes_shared=n // 2, pages_to_scan=8 * n)

    def checked(self, geometry: Geometry) -> Tunables:
        """Return these tunables if a kernel of this geometry would accept every one of them.

        Raises:
            UsageError: a limit is outside 0 to N - 1 for N PTEs per PMD range, or a pace is not positive.
        """
        for knob in dataclasses.fields(self):
            if not isinstance(getattr(self, knob.name), Integral):
                raise UsageError(f"{knob.name} {getattr(self, knob.name)!r} is not an integer")
        highest = geometry.ptes_per_pmd - 1
        for name in LIMITS:
            value = getattr(self, name)
            if not 0 <= value <= highest:
                raise UsageError(f"{name} {value} is not within 0 to {highest}, the PTEs of a PMD range less one")
        if self.pages_to_scan < 1:
            raise UsageError(f"pages_to_scan {self.pages_to_scan} is not at least 1")
        for name in ("scan_sleep_millisecs", "alloc_sleep_millisecs"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} {getattr(self, name)} is below 0")
        return self

    def replaced(self, geometry: Geometry, **values: int | None) -> Tunables:
        """Return these tunables with those `values` that are not None, checked.

        Raises:
            UsageError: as :meth:`checked`.
        """
        given = {name: value for name, value in values.items() if value is not None}
        return dataclasses.replace(self, **given).checked(geometry)  # type: ignore[arg-type]

    @classmethod
    def from_sysfs(cls, texts: Mapping[str, str], geometry: Geometry) -> Tunables:
        """Return the tunables in the files of the khugepaged directory, by file name; a missing file has its default.

        Raises:
            UsageError: a text is not a number, or out of range.
        """
        values: dict[str, int] = {}
        for knob in dataclasses.fields(cls):
            text = texts.get(knob.name)
            if text is None:
                continue
            try:
                values[knob.name] = int(text)
            except ValueError:
                raise UsageError(f"{knob.name}: {text.strip()!r} is not a number") from None
        tunables = cls.defaults(geometry).replaced(geometry, **values)
        return dataclasses.replace(tunables, defrag=bool(tunables.defrag))


LIMITS = ("max_ptes_none", "max_ptes_swap", "max_ptes_shared")
"""The three tunables that the kernel bounds by the PTEs of a PMD range less one."""


@dataclass(frozen=True, slots=True)
class Switches:
    """The folio sizes that the system allows anonymous memory.

    Attributes:
        enabled: the top-level word: always, madvise, never.
        sizes: the word of each order that has a switch.
    """

    JSON: ClassVar = "enabled sizes=words_by_size"

    enabled: str = "madvise"
    sizes: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_word(self.enabled, TOP_WORDS, "enabled")
        for order, word in self.sizes.items():
            _check_word(word, SIZE_WORDS, f"enabled of order {order}")

    def words_by_size(self, geometry: Geometry) -> dict[str, str]:
        """Return the words by size, such as ``"64K"``."""
        return {geometry.label(order): word for order, word in self.sizes.items()}

    @classmethod
    def defaults(cls, geometry: Geometry) -> Switches:
        """Return the initial switches of a kernel: the PMD size inherits, the smaller sizes are off."""
        sizes = dict.fromkeys(geometry.anon_orders, "never") | {geometry.pmd_order: "inherit"}
        return cls("madvise", sizes)

    @classmethod
    def from_sysfs(cls, texts: Mapping[str, str], geometry: Geometry) -> Switches:
        """Return the switches in the files ``enabled`` and ``hugepages-<size>kB/enabled``, by path below the THP one.

        Sizes that are not anonymous folio sizes of this geometry (some kernels have an 8 kB directory) are left out. A
        kernel without per-size switches (before 6.8) has only the PMD size, which inherits.

        Raises:
            UsageError: a text has no known word in brackets.
        """
        top = chosen_word(texts["enabled"], TOP_WORDS, "enabled") if "enabled" in texts else "never"
        sizes = {}
        for order in geometry.anon_orders:
            path = f"{geometry.sysfs_name(order)}/enabled"
            if path in texts:
                sizes[order] = chosen_word(texts[path], SIZE_WORDS, path)
        return cls(top, sizes or {geometry.pmd_order: "inherit"})

    def orders(self, *, advised: bool) -> tuple[int, ...]:
        """Return the orders that are on for memory with MADV_HUGEPAGE (`advised`), or without advice, ascending."""
        words = {"always"} | ({"madvise"} if advised else set())
        return tuple(
            sorted(
                order
                for order, word in self.sizes.items()
                if order >= MIN_ANON_ORDER and (self.enabled if word == "inherit" else word) in words
            )
        )


def read_tunables(document: TomlDocument, geometry: Geometry) -> dict[str, int]:
    """Return the values that the table ``[tunables]`` sets, by name."""
    limit = whole(0, geometry.ptes_per_pmd - 1)
    special = dict.fromkeys(LIMITS, limit) | {"pages_to_scan": whole(1), "defrag": whole(0, 1)}
    names = [knob.name for knob in dataclasses.fields(Tunables)]
    return document.values(("tunables",), {name: (name, special.get(name, whole())) for name in names})


def read_switches(document: TomlDocument, geometry: Geometry) -> tuple[str | None, dict[int, str]]:
    """Return the top-level word of the table ``[switches]``, None without one, and the words by order."""
    keys = {"enabled": ("enabled", one_of(*TOP_WORDS))}
    keys |= {geometry.label(order): (str(order), one_of(*SIZE_WORDS)) for order in geometry.anon_orders}
    for key in document.keys("switches"):
        # A key may be a size in any notation.
        with suppress(UsageError):
            keys.setdefault(key, (str(geometry.parse_order(key)), one_of(*SIZE_WORDS)))
    found = document.values(("switches",), keys)
    enabled = found.pop("enabled", None)
    return enabled, {int(order): word for order, word in found.items()}


def chosen_word(text: str, words: Iterable[str], name: str) -> str:
    """Return the word in brackets of a sysfs choice such as ``"always [madvise] never"``, or the only word.

    Raises:
        UsageError: no word, or one that is not in `words`.
    """
    parts = text.split()
    chosen = [part[1:-1] for part in parts if part.startswith("[") and part.endswith("]")] or parts
    if len(chosen) != 1:
        raise UsageError(f"{name}: no choice in {text.strip()!r}")
    return _check_word(chosen[0], words, name)


def _check_word(word: str, words: Iterable[str], name: str) -> str:
    if word not in words:
        raise UsageError(f"{name}: {word!r} is not one of {', '.join(words)}")
    return word
