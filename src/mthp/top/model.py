"""The rows of the table, in which order they stand, and how they are drawn in characters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mthp.geometry import Geometry
from mthp.units import format_size

BLOCKS = "░▒▓█"
"""Of base pages, of the lower half of orders, of the upper half, of the PMD order: bars can be read without colour."""

UNKNOWN = -1
"""Among orders: memory whose folio's order cannot be seen."""


@dataclass(frozen=True, slots=True)
class Row:
    """A process, or a mapping of one.

    Attributes:
        key: the PID, or the mapping's address.
        name: of the process or the mapping.
        resident: bytes.
        anonymous: bytes that may be collapsed, about.
        huge: bytes of them that PMD entries map; None if not looked at yet.
        by_order: bytes by folio order; None if not looked at yet.
        gain: bytes that a collapse would bring into larger folios; an upper bound where `planned` is False, None if
            nothing is known.
        bloat: bytes that it would add; None if not planned yet.
        folios: folios that it would make, by order.
        planned: whether gain, bloat and folios come from a plan.
        trouble: why it cannot be looked at, or ``""``.
    """

    key: int
    name: str
    resident: int
    anonymous: int
    huge: int | None = None
    by_order: Mapping[int, int] | None = None
    gain: int | None = None
    bloat: int | None = None
    folios: Mapping[int, int] = field(default_factory=dict)
    planned: bool = False
    trouble: str = ""

    @property
    def huge_share(self) -> float | None:
        """The part of the anonymous memory that PMD entries map."""
        if self.huge is None:
            return None
        return min(1.0, self.huge / self.anonymous) if self.anonymous else 0.0


_SORT_VALUES: dict[str, Callable[[Row], float | str]] = {
    "gain": lambda row: -1 if row.gain is None else row.gain,
    "resident": lambda row: row.resident,
    "huge": lambda row: -1.0 if row.huge_share is None else row.huge_share,
    "bloat": lambda row: -1 if row.bloat is None else row.bloat,
    "name": lambda row: row.name.lower(),
    "id": lambda row: row.key,
}

SORTS = tuple(_SORT_VALUES)
"""What rows can be sorted by; figures begin with the largest, names and numbers with the smallest."""


def arranged(rows: Iterable[Row], sort: str, *, reverse: bool = False, wanted: str = "") -> list[Row]:
    """The rows that contain `wanted` in their name or number, sorted.

    Args:
        sort: one of :data:`SORTS`.
        wanted: text, compared without regard to case.
    """
    wanted = wanted.lower()
    found = [row for row in rows if wanted in row.name.lower() or wanted in str(row.key)]
    # Rows that are equal keep an order of their own, or they would change places at every look.
    found.sort(key=lambda row: row.key)
    found.sort(key=_SORT_VALUES[sort], reverse=(sort not in ("name", "id")) != reverse)
    return found


def block_of(order: int, geometry: Geometry) -> str:
    """The character that stands for folios of `order`."""
    if order == UNKNOWN:
        return "?"
    if order <= 0:
        return BLOCKS[0]
    if order >= geometry.pmd_order:
        return BLOCKS[3]
    return BLOCKS[1] if order * 2 <= geometry.pmd_order else BLOCKS[2]


def bar(by_order: Mapping[int, int], geometry: Geometry, width: int) -> list[tuple[int, str]]:
    """A bar of `width` characters: for each order that gets any, the largest first, its characters.

    Every order gets its share, rounded so that the bar is full; what is less than half a character is not seen.
    """
    total = sum(by_order.values())
    parts: list[tuple[int, str]] = []
    done, drawn = 0, 0
    for order in sorted(by_order, reverse=True):
        done += by_order[order]
        until = (2 * done * width + total) // (2 * total) if total else 0
        if until > drawn:
            parts.append((order, block_of(order, geometry) * (until - drawn)))
            drawn = until
    return parts


def described(by_order: Mapping[int, int], geometry: Geometry) -> str:
    """Bytes by folio size in words: ``"2M 1.5G, 64K 12M, 4K 300M"``."""
    parts = [
        f"{'size not visible' if order == UNKNOWN else geometry.label(order)} {format_size(size)}"
        for order, size in sorted(by_order.items(), reverse=True)
        if size
    ]
    return ", ".join(parts) or "nothing"


def totals(rows: Sequence[Row]) -> tuple[int, int]:
    """Bytes resident, and bytes that could be gained as far as known, of all rows together."""
    return sum(row.resident for row in rows), sum(row.gain or 0 for row in rows)
