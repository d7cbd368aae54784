"""The map of an address space: how much of which folio order lies where.

A process of 64 GiB has 16 million pages and a printed page has room for some ten thousand cells. So the map consists of
*columns*: each stands for a stretch of addresses and is filled from below with its memory, the largest folios first, in
eighths. A column shows true proportions: there is no typical colour and no average colour. Columns are laid in rows, as
text is, and every mapping begins a new row.

Kinds differ in lightness, which does not depend on colour vision, and memory that a collapse would add is hatched.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace
from mthp.engine.census import Census, VmaCensus, take_census
from mthp.engine.space_plan import Folios
from mthp.geometry import Geometry
from mthp.progress import Progress, ReadProgress
from mthp.ptes import Segment, bytes_in, in_portions, union
from mthp.report.kinds import Kinds
from mthp.units import format_size
from mthp.vma import Vma

COLUMNS = 256
"""Columns in a row."""

LEVELS = 8
"""Heights that a column can be filled to."""

MAX_ROWS = 56
"""Rows of a whole map, not counting rows that are not full."""

MAX_STRIPS = 24
"""Most mappings that are drawn: those with most memory. The others are in the tables."""

MIN_SHARE = 0.01
"""Share of all memory that a mapping must hold to be drawn; the largest mapping always is."""

PORTION_BYTES = 1 << 30
"""Bytes of addresses read at a time."""

_GAP = 2
"""Empty lines between rows, in units of levels."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One SVG drawing of a strip.

    Attributes:
        rows: rows of columns in it.
        paths: the class of a kind, and the path of its runs.
        summary: description in words, for screen readers.
    """

    rows: int
    paths: tuple[tuple[str, str], ...]
    summary: str

    @property
    def height(self) -> int:
        """The height of the drawing, in units of levels."""
        return self.rows * (LEVELS + _GAP)


@dataclass(frozen=True, slots=True)
class Strip:
    """One mapping: its picture now and, if known, its picture afterwards."""

    name: str
    address: str
    size: str
    before: Picture
    after: Picture | None


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """One kind and its amount, before and after."""

    key: str
    label: str
    before: str
    after: str


@dataclass(frozen=True, slots=True)
class MemoryMap:
    """The map of an address space.

    Attributes:
        title: text above the map.
        scale: the sizes of a row and of a column, in words.
        strips: the mappings, by address.
        legend: the kinds that occur.
        before_name, after_name: names of the two states.
        left_out: a sentence on the mappings that are not drawn, or ``""``.
    """

    title: str
    scale: str
    strips: tuple[Strip, ...]
    legend: tuple[LegendEntry, ...]
    before_name: str
    after_name: str
    left_out: str

    width = COLUMNS


@dataclass(frozen=True, slots=True)
class Stretch:
    """A mapping that is drawn, and its parts that are not empty, in whole PMD ranges or to the mapping's ends."""

    vma: Vma
    segments: tuple[Segment, ...]

    @property
    def bytes(self) -> int:
        """The bytes of the parts."""
        return bytes_in(self.segments)


def stretches(space: AddressSpace, census: Census, later: AddressSpace | None = None) -> list[Stretch]:
    """Return the mappings of `space` that hold most memory, by address.

    Args:
        later: the same process afterwards; its mappings count as well, and a stretch has the parts that are not empty
            in either state.
    """
    states = [space] if later is None else [space, later]
    vmas = list(census.vmas)
    if later is not None:
        after = take_census(later).vmas
        # A mapping that grew or was split is drawn as it is afterwards.
        ends = [vma.vma.end for vma in after]
        vmas = [*after, *(vma for vma in vmas if not _reaches_into(vma.vma, after, ends))]
    ranked = sorted((vma for vma in vmas if _held(vma)), key=lambda vma: -_held(vma))
    enough = MIN_SHARE * sum(map(_held, ranked))
    largest = ranked[:1] + [vma for vma in ranked[1:MAX_STRIPS] if _held(vma) >= enough]
    size = space.geometry.pmd_size
    return [
        # Without empty PMD ranges, so that a sparse arena of terabytes remains readable.
        Stretch(vma, union(part for each in states for part in each.populated([(vma.start, vma.end)], size)))
        for vma in sorted((each.vma for each in largest), key=lambda vma: vma.start)
    ]


def _reaches_into(vma: Vma, others: Sequence[VmaCensus], ends: Sequence[int]) -> bool:
    """Return whether `vma` overlaps one of `others`, which ascend and have these `ends`."""
    # The first that ends behind the start of `vma`, and so the only one to check.
    at = bisect.bisect_right(ends, vma.start)
    return at < len(others) and others[at].vma.start < vma.end


def _held(vma: VmaCensus) -> int:
    return vma.pages.resident + vma.pages.state("swap")


def column_bytes_for(parts: Sequence[Stretch], geometry: Geometry) -> int:
    """Return the smallest power of two of bytes per column with which `parts` keep within MAX_ROWS full rows."""
    size = geometry.page_size
    # A map costs the same for every size of process.
    while sum(part.bytes for part in parts) > MAX_ROWS * COLUMNS * size:
        size *= 2
    return size


Shares = list[NDArray[np.int64]]
"""The columns of each stretch: int64, shape (columns, kinds): pages of each kind."""


def shares(
    space: AddressSpace,
    parts: Sequence[Stretch],
    column_bytes: int,
    folios: Folios | None = None,
    progress: Progress | None = None,
    *,
    portion_bytes: int = PORTION_BYTES,
) -> Shares:
    """Read `parts` of `space` and return their pages by column and kind.

    Args:
        folios: count as if these had been made; pages that they fill are of the kind "added".
        portion_bytes: bytes of addresses to read at a time.

    Raises:
        TargetVanishedError: the process exited meanwhile.
    """
    kinds, page_size = Kinds(space.geometry), space.geometry.page_size
    counted = []
    reading = ReadProgress(progress, [segment for part in parts for segment in part.segments])
    for part in parts:
        counts = np.zeros((-(-part.bytes // column_bytes), len(kinds)), np.int64)
        offset = 0
        for portion in in_portions(part.segments, portion_bytes):
            kind = kinds.numbers(space.read(portion))
            if folios is not None:
                _lay(kind, portion, folios, kinds, page_size)
            # Reduced at once, so memory use does not depend on the size of the process.
            _count(counts, kind, offset, column_bytes // page_size)
            offset += len(kind)
            reading.has_read(portion)
        counted.append(counts)
    return counted


def _count(counts: NDArray[np.int64], kind: NDArray[np.int8], offset: int, per_column: int) -> None:
    """Add pages of `kind`, the first of which is page `offset` of the stretch, to the columns of `counts`."""
    # A column number for every page would take eight times the memory of the kinds; runs of one kind are few.
    heads = np.ones(len(kind), np.bool_)
    heads[1:] = kind[1:] != kind[:-1]
    # A run ends at the border of a column, too.
    heads[-offset % per_column :: per_column] = True
    at = np.flatnonzero(heads)
    length = np.diff(at, append=len(kind))
    held = kind[at] >= 0
    index = (at[held] + offset) // per_column * counts.shape[1] + kind[at[held]]
    counts += np.bincount(index, weights=length[held], minlength=counts.size).reshape(counts.shape).astype(np.int64)


def _lay(kind: NDArray[np.int8], block: Sequence[Segment], folios: Folios, kinds: Kinds, page_size: int) -> None:
    """Set the `kind` of the pages of `block` to their kind after `folios` are made."""
    first = 0
    for start, end in block:
        stop = first + (end - start) // page_size
        low, high = np.searchsorted(folios.address, np.array([start, end], np.uint64)).tolist()
        # A block may begin within a folio that began in the block before.
        chosen = folios[np.arange(max(low - 1, 0), high)]
        count = np.int64(1) << chosen.order.astype(np.int64)
        page = chosen.address.astype(np.int64) // page_size - start // page_size + first
        index = np.arange(int(count.sum())) + np.repeat(page - (np.cumsum(count) - count), count)
        made = np.repeat(kinds.of_order[chosen.order], count)
        inside = (index >= first) & (index < stop)
        index, made = index[inside], made[inside]
        # Empty pages in a planned folio are what the collapse fills.
        kind[index] = np.where(kind[index] < 0, kinds.added, made)
        first = stop


def draw(counts: NDArray[np.int64], per_column: int, kinds: Kinds, geometry: Geometry) -> Picture:
    """Return a strip of columns as a picture.

    Args:
        counts: int64, shape (columns, kinds): pages.
        per_column: pages in a full column.
    """
    rows = -(-len(counts) // COLUMNS)
    # Sums are rounded, and not the kinds one by one, so that errors do not add up in a column.
    top = np.rint(np.cumsum(counts, axis=1) * (LEVELS / per_column)).astype(np.int64)
    padded = np.zeros((rows * COLUMNS, counts.shape[1]), np.int64)
    padded[: len(top)] = top
    # The kind at a level is the first with its top above it, so its number is the number of tops that are not.
    level = np.arange(LEVELS)
    raster = (padded[:, None, :] <= level[None, :, None]).sum(axis=2).reshape(rows, COLUMNS, LEVELS)
    # Columns are filled from below, and in SVG y grows downwards.
    lines = raster.transpose(0, 2, 1)[:, ::-1]
    paths = tuple((kind.key, path) for number, kind in enumerate(kinds.all) if (path := _runs(lines == number)))
    return Picture(rows, paths, _summary(counts.sum(axis=0), kinds, geometry))


def _runs(cells: NDArray[np.bool_]) -> str:
    """Return the SVG path of the horizontal runs of `cells`: bool, shape (rows, LEVELS, COLUMNS)."""
    rows, levels, columns = cells.shape
    # A blank at both sides, so that runs at the edges begin and end.
    edges = np.zeros((rows, levels, columns + 2), np.int8)
    edges[:, :, 1:-1] = cells
    change = np.diff(edges, axis=2)
    row, line, start = np.nonzero(change == 1)
    length = np.nonzero(change == -1)[2] - start
    y = row * (LEVELS + _GAP) + line
    # Strokes of width 1 lie around their path: half a unit lower they fill their line. They take a few bytes each.
    return "".join(f"M{x} {v}.5h{n}" for x, v, n in zip(start.tolist(), y.tolist(), length.tolist(), strict=True))


def _summary(pages: NDArray[np.int64], kinds: Kinds, geometry: Geometry) -> str:
    parts = [
        f"{format_size(count * geometry.page_size)} {kind.label}"
        for kind, count in zip(kinds.all, pages.tolist(), strict=True)
        if count
    ]
    return ", ".join(parts) or "nothing"


def make_map(
    space: AddressSpace,
    census: Census,
    *,
    names: tuple[str, str],
    folios: Folios | None = None,
    later: AddressSpace | None = None,
    title: str = "Where the folios lie",
    progress: Progress | None = None,
) -> MemoryMap:
    """Draw `space`, and beside it the same memory with `folios` made, or as it is in `later`.

    Args:
        names: names of the two states.

    Raises:
        TargetVanishedError: the process exited meanwhile.
    """
    geometry = space.geometry
    parts = stretches(space, census, later)
    size = column_bytes_for(parts, geometry)
    before = shares(space, parts, size, progress=progress)
    after = None
    if later is not None:
        after = shares(later, parts, size)
    elif folios is not None:
        after = shares(space, parts, size, folios)
    kinds, per_column = Kinds(geometry), size // geometry.page_size
    strips = tuple(
        Strip(
            name=part.vma.name or "anonymous",
            address=f"{part.vma.start:x}-{part.vma.end:x}",
            size=format_size(int(before[at].sum()) * geometry.page_size),
            before=draw(before[at], per_column, kinds, geometry),
            after=None if after is None else draw(after[at], per_column, kinds, geometry),
        )
        for at, part in enumerate(parts)
    )
    return MemoryMap(
        title=title,
        scale=f"A row is {format_size(size * COLUMNS)} of addresses, a column {format_size(size)},"
        f" filled from below; stretches of {format_size(geometry.pmd_size)} that hold nothing are left out.",
        strips=strips,
        legend=_legend(before, after, kinds, geometry),
        before_name=names[0],
        after_name=names[1],
        left_out=_left_out(census, len(parts)),
    )


def _left_out(census: Census, drawn: int) -> str:
    rest = sorted((held for vma in census.vmas if (held := _held(vma))), reverse=True)[drawn:]
    if not rest:
        return ""
    return (
        f"{len(rest)} smaller mappings, which hold {format_size(sum(rest) * census.geometry.page_size)} together,"
        " are not drawn."
    )


def _legend(before: Shares, after: Shares | None, kinds: Kinds, geometry: Geometry) -> tuple[LegendEntry, ...]:
    def totals(these: Shares | None) -> NDArray[np.int64]:
        return sum((pages.sum(axis=0) for pages in these or ()), np.zeros(len(kinds), np.int64))

    one, two = totals(before), totals(after)
    return tuple(
        LegendEntry(
            kind.key,
            kind.label,
            format_size(int(one[at]) * geometry.page_size),
            format_size(int(two[at]) * geometry.page_size) if after is not None else "",
        )
        for at, kind in enumerate(kinds.all)
        if one[at] or two[at]
    )
