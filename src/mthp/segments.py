"""Ranges of addresses, cut into pieces that can be read at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mthp.geometry import Geometry
from mthp.ptes import Segment


def at_pmd_ranges(segments: Iterable[Segment], geometry: Geometry) -> Iterator[Segment]:
    """`segments`, those that begin inside a PMD range cut at its end.

    :func:`in_blocks` cuts at multiples of its size from a segment's start, so it cuts these at PMD ranges only.
    """
    for start, end in segments:
        aligned = -(-start // geometry.pmd_size) * geometry.pmd_size
        if start < aligned < end:
            yield start, aligned
            start = aligned
        yield start, end


def in_range_blocks(segments: Iterable[Segment], geometry: Geometry, block_size: int) -> Iterator[list[Segment]]:
    """As :func:`in_blocks`, but what lies in one PMD range comes in one group, which may be that much larger."""
    block: list[Segment] = []
    room = block_size
    for [segment] in (group for piece in at_pmd_ranges(segments, geometry) for group in in_blocks([piece], block_size)):
        start, end = segment
        if block and end - start > room and start // geometry.pmd_size != (block[-1][1] - 1) // geometry.pmd_size:
            yield block
            block, room = [], block_size
        block.append(segment)
        room -= end - start
    if block:
        yield block


def in_blocks(segments: Iterable[Segment], block_size: int) -> Iterator[list[Segment]]:
    """Group and cut `segments` so that each group holds at most `block_size` bytes.

    Cuts fall on multiples of `block_size` from a segment's start, so segments of whole PMD ranges are cut into such,
    if the block size is a multiple of the PMD size.
    """
    block: list[Segment] = []
    room = block_size
    for start, end in segments:
        while start < end:
            if block and end - start > room:
                yield block
                block, room = [], block_size
            stop = min(end, start + room)
            block.append((start, stop))
            room -= stop - start
            start = stop
    if block:
        yield block


def without(segments: Iterable[Segment], removed: Iterable[Segment]) -> Iterator[Segment]:
    """Yield what of `segments` lies in none of `removed`. Both ascend, and their segments do not overlap."""
    holes = iter(removed)
    hole = next(holes, None)
    for begin, end in segments:
        start = begin
        while hole is not None and hole[0] < end:
            if start < hole[0]:
                yield start, hole[0]
            start = max(start, min(hole[1], end))
            if hole[1] > end:
                break
            hole = next(holes, None)
        if start < end:
            yield start, end
