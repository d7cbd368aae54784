"""The rows of the table, their order, and their bars in characters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mthp.geometry import Geometry
from mthp.units import format_size

BLOCKS = "░▒▓█"
"""Characters for base pages, the lower half of orders, the upper half, the PMD order: bars work without colour."""

UNKNOWN = -1
"""Key among orders for memory in folios of unknown order."""


@dataclass(frozen=True, slots=True)
class Row:
    """A process, or a mapping of one.

    Attributes:
        key: the PID, or the mapping's address.
        name: name of the process or the mapping.
        resident: bytes.
        anonymous: bytes that may be collapsed, about.
        huge: bytes of `anonymous` that PMD entries map; None if not read yet.
        by_order: bytes by folio order; None if not read yet.
        gain: bytes that a collapse would bring into larger folios; an upper bound where `planned` is False, None if
            nothing is known.
        bloat: bytes that a collapse would add; None if not planned yet.
        out_of_reach: bytes of `anonymous` in no whole PMD range of their mapping; None if not read yet.
        folios: number of folios that a collapse would make, by order.
        planned: whether gain, bloat and folios come from a plan.
        trouble: the reason for which the row cannot be read, or ``""``.
    """

    key: int
    name: str
    resident: int
    anonymous: int
    huge: int | None = None
    by_order: Mapping[int, int] | None = None
    gain: int | None = None
    bloat: int | None = None
    out_of_reach: int | None = None
    folios: Mapping[int, int] = field(default_factory=dict)
    planned: bool = False
    trouble: str = ""

    @property
    def huge_share(self) -> float | None:
        """The part of the anonymous memory that PMD entries map, None if unknown."""
        if self.huge is None:
            return None
        return min(1.0, self.huge / self.anonymous) if self.anonymous else 0.0


_SORT_VALUES: dict[str, Callable[[Row], float | str]] = {
    # Unknown values come after 0.
    "gain": lambda row: -1 if row.gain is None else row.gain,
    "resident": lambda row: row.resident,
    "huge": lambda row: -1.0 if row.huge_share is None else row.huge_share,
    "bloat": lambda row: -1 if row.bloat is None else row.bloat,
    "name": lambda row: row.name.lower(),
    "id": lambda row: row.key,
}

SORTS = tuple(_SORT_VALUES)
"""Keys to sort rows by; figures begin with the largest, names and numbers with the smallest."""


def arranged(rows: Iterable[Row], sort: str, *, reverse: bool = False, wanted: str = "") -> list[Row]:
    """Return the rows that contain `wanted` in their name or number, sorted.

    Args:
        sort: one of :data:`SORTS`.
        wanted: text, compared without regard to case.
    """
    wanted = wanted.lower()
    found = [row for row in rows if wanted in row.name.lower() or wanted in str(row.key)]
    # The key breaks ties, because equal rows would otherwise change places at every look.
    found.sort(key=lambda row: row.key)
    # Sorting is stable, so this keeps the order of equal rows.
    found.sort(key=_SORT_VALUES[sort], reverse=(sort not in ("name", "id")) != reverse)
    return found


def block_of(order: int, geometry: Geometry) -> str:
    """Return the character that stands for folios of `order`."""
    if order == UNKNOWN:
        return "?"
    if order <= 0:
        return BLOCKS[0]
    if order >= geometry.pmd_order:
        return BLOCKS[3]
    return BLOCKS[1] if order * 2 <= geometry.pmd_order else BLOCKS[2]


def bar(by_order: Mapping[int, int], geometry: Geometry, width: int) -> list[tuple[int, str]]:
    """Return a bar of `width` characters: for each visible order, the largest first, its characters.

    Every order has its share, rounded so that the bar is full; less than half a character is not shown.
    """
    total = sum(by_order.values())
    parts: list[tuple[int, str]] = []
    done, drawn = 0, 0
    for order in sorted(by_order, reverse=True):
        done += by_order[order]
        # Sums are rounded, and not the parts one by one, so that the parts fill the bar.
        until = (2 * done * width + total) // (2 * total) if total else 0
        if until > drawn:
            parts.append((order, block_of(order, geometry) * (until - drawn)))
            drawn = until
    return parts


def described(by_order: Mapping[int, int], geometry: Geometry) -> str:
    """Return bytes by folio size in words: ``"2M 1.5G, 64K 12M, 4K 300M"``."""
    parts = [
        f"{'size not visible' if order == UNKNOWN else geometry.label(order)} {format_size(size)}"
        for order, size in sorted(by_order.items(), reverse=True)
        if size
    ]
    return ", ".join(parts) or "nothing"


def totals(rows: Sequence[Row]) -> tuple[int, int]:
    """Return the resident bytes and the known gain in bytes of all rows together."""
    return sum(row.resident for row in rows), sum(row.gain or 0 for row in rows)
