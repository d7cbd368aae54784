"""Find the frames behind the pages of a process, for sources that monitor physical memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.abilities import READ_PORTION
from mthp.errors import NotPermittedError
from mthp.heat import Heat
from mthp.linux.processspace import ProcessSpace
from mthp.ptes import Pte, Segment, in_portions

GAP_FRAMES = 512
"""Largest distance of two frames of the target in one segment of physical memory."""


@dataclass(frozen=True, slots=True)
class Frames:
    """Pages and the frames behind them.

    Attributes:
        address: uint64, shape (pages,), ascending.
        frame: uint64, the same shape: page frame numbers.
    """

    address: NDArray[np.uint64]
    frame: NDArray[np.uint64]


def frames_of(space: ProcessSpace, segments: list[Segment], *, shared: bool = True) -> Frames:
    """Return the pages of `segments` that are present, with their frames.

    Args:
        shared: whether to include frames that other processes map, too.

    Raises:
        NotPermittedError: these rights do not show frames.
    """
    page_size = space.geometry.page_size
    addresses, frames = [], []
    for portion in in_portions(segments, READ_PORTION):
        columns = space.read(portion)
        if columns.pfn is None:
            raise NotPermittedError("page frame numbers are hidden", help="run as root (CAP_SYS_ADMIN)")
        address = np.concatenate([np.arange(start, end, page_size, dtype=np.uint64) for start, end in portion])
        present = columns.pfn > 0
        if not shared:
            present &= ~columns.has(Pte.SHARED | Pte.ZERO)
        addresses.append(address[present])
        frames.append(columns.pfn[present])
    if not addresses:
        return Frames(np.empty(0, np.uint64), np.empty(0, np.uint64))
    return Frames(np.concatenate(addresses), np.concatenate(frames))


def frame_segments(frames: Frames, page_size: int, most: int) -> list[Segment]:
    """Return the physical addresses of `frames`, in no more than `most` segments."""
    if not len(frames.frame):
        return []
    ordered = np.unique(frames.frame)
    gaps = np.diff(ordered)
    least = np.uint64(GAP_FRAMES)
    # Every segment is a region to sample: bridge all but the largest gaps, although others' frames are sampled too.
    if np.count_nonzero(gaps > least) >= most:
        least = np.partition(gaps, -most)[-most]
    breaks = np.flatnonzero(gaps > least) + 1
    first, last = ordered[np.r_[0, breaks]], ordered[np.r_[breaks - 1, len(ordered) - 1]]
    return [(low * page_size, (high + 1) * page_size) for low, high in zip(first.tolist(), last.tolist(), strict=True)]


def to_virtual(heat: Heat, frames: Frames, space: ProcessSpace) -> Heat:
    """Return the heat of physical addresses by PMD range of the pages mapped there."""
    page_size, size = np.uint64(space.geometry.page_size), np.uint64(space.geometry.pmd_size)
    begin = frames.frame * page_size
    accesses = heat.within(begin, begin + page_size)
    ranges, at = np.unique(frames.address // size * size, return_inverse=True)
    summed = np.bincount(at, weights=accesses, minlength=len(ranges)).astype(np.float64)
    return Heat.of_spans(ranges, ranges + size, summed)
