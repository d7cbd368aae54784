"""The part of a plan that memory allows (:mod:`mthp.engine.reach`), and the resulting coverage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mthp.abilities import free_memory
from mthp.addrspace import AddressSpace
from mthp.budget import Room
from mthp.engine.admission import room_of
from mthp.engine.allowed import made_by, mechanisms_of
from mthp.engine.reach import Limit, Steps, Supply, reachable
from mthp.engine.space_plan import SpacePlan
from mthp.engine.splitprice import resident_in
from mthp.engine.trim import TrimOptions, TrimPlan, plan_trim
from mthp.errors import NotPermittedError, UnsupportedError
from mthp.freememory import FreeMemory
from mthp.means import Means
from mthp.measuring import BLOCK_PAGES, measure
from mthp.metrics import Coverage, anonymous_pages, page_numbers
from mthp.ptes import Pte, in_range_blocks
from mthp.trimming import in_use
from mthp.units import format_size

Progress = Callable[[int, int, str], None]

MOST_FRAMES = 1 << 24
"""Pages of a plan up to which their frames are looked up, 64 GiB on x86-64. It takes some 50 bytes for each; in larger
plans the blocks that come free as a whole are left out, so what is predicted is less than what is reached."""

NO_TYPES = "not known: /proc/pagetypeinfo cannot be read, run it as root"


@dataclass(frozen=True, slots=True)
class Reached:
    """The reachable part of a plan, in one way.

    Attributes:
        coverage: the coverage afterwards, by the plan's definition; None if unknown.
        size: bytes in the folios that can be made; None if unknown.
        folios_by_order: number of folios by order, the largest first.
        limit: what limits it, or why it is unknown, as a clause.
    """

    JSON: ClassVar = "coverage bytes=size folios_by_order limited_by=limit"

    coverage: float | None
    size: int | None
    folios_by_order: dict[int, int]
    limit: str

    @classmethod
    def unknown(cls, why: str) -> Reached:
        """Return a result that is unknown for the reason `why`."""
        return cls(None, None, {}, why)


@dataclass(frozen=True, slots=True)
class Reach:
    """The reachable part of a plan, in three ways.

    Attributes:
        now: at this moment, with the folios that are free.
        compacted: with compaction of movable memory when folios are needed, as MADV_COLLAPSE does.
        trimmed: as `compacted`, after zeroes in large folios that the plan leaves alone were given back.
    """

    JSON: ClassVar = "now after_compaction=compacted after_trim=trimmed"

    now: Reached
    compacted: Reached
    trimmed: Reached


def reach_of(space: AddressSpace, plan: SpacePlan, means: Means, progress: Progress | None = None) -> Reach:
    """Predict the part of `plan` that `means` can reach, in each way separately.

    Args:
        progress: called while contents are read.

    Raises:
        UnsupportedError: the free memory of the machine cannot be read.
        TargetVanishedError: the process exited in the meantime.
    """
    free = free_memory(space)
    if free is None:
        raise UnsupportedError(
            f"{space.label}: the free memory of its machine cannot be seen", help="use a running process"
        )
    reaching = _Reaching(space, plan, means)
    now = reaching.reached(free, compacted=False)
    # Without migrate types it is unknown which free and used pages compaction could move.
    if not free.known_types:
        return Reach(now, Reached.unknown(NO_TYPES), Reached.unknown(NO_TYPES))
    compacted = reaching.reached(free, compacted=True)
    try:
        trim = plan_trim(space, TrimOptions(), progress)
    except (UnsupportedError, NotPermittedError) as error:
        return Reach(now, compacted, Reached.unknown(f"not known: {error.message}"))
    if trim.by is None:
        return Reach(now, compacted, Reached.unknown("folios cannot be trimmed here: run mthp doctor"))
    return Reach(now, compacted, reaching.reached(free, compacted=True, trim=_beside(trim, plan)))


class _Reaching:
    """The steps of a plan, and the memory that they may take."""

    def __init__(self, space: AddressSpace, plan: SpacePlan, means: Means) -> None:
        self._space, self._plan, self._geometry = space, plan, plan.geometry
        self._work = _work_of(space, plan, means)
        self._room: Room = room_of(space, means)
        self._frames: _Frames | None = None
        self._measured: dict[bytes, Coverage] = {}

    def reached(self, free: FreeMemory, *, compacted: bool, trim: TrimPlan | None = None) -> Reached:
        """Return the part that is reached with this free memory, or after a trim of large folios."""
        page_size = self._geometry.page_size
        given_back = 0 if trim is None else sum(trim.gains)
        room = None if self._room.spare is None else self._room.spare // page_size + given_back
        free = free.plus(given_back)
        supply = Supply(free, room, compacted)
        steps = self._work.steps
        if self._frames is None:
            done, limits = reachable(steps, supply)
            if set(limits.values()) - {Limit.NOTHING}:
                # Frames are read only if the result depends on them.
                self._frames = _frames(self._space, self._work)
        if self._frames is not None:
            sure = self._frames.sure
            # Pages of huge folios do not lie in other page blocks either.
            share = free.packed(int(sure.sum()) + self._plan.before.pages[self._plan.geometry.pmd_order])
            others = np.rint(np.cumsum(share * np.maximum(steps.released - sure, 0))).astype(np.int64)
            # Rounded as a running sum, so that many small steps do not each lose their fraction.
            released = sure + np.diff(others, prepend=0)
            done, limits = reachable(replace(steps, released=released), replace(supply, merged=self._frames.merged))
        chosen = done[self._work.step_of]
        coverage = self._coverage(chosen)
        if trim is not None:
            coverage = _without(coverage, trim)
        return Reached(
            coverage.share(self._plan.asked_order),
            int((np.int64(page_size) << self._plan.folios.order[chosen].astype(np.int64)).sum()),
            replace(self._plan, folios=self._plan.folios[chosen]).folios_by_order,
            self._sentence(limits, supply),
        )

    def _coverage(self, chosen: NDArray[np.bool_]) -> Coverage:
        """Return the coverage after the chosen folios are made: bool, shape (folios,)."""
        if chosen.all():
            return self._plan.after
        if not chosen.any():
            return self._plan.before
        if (key := chosen.tobytes()) not in self._measured:
            folios, space = self._plan.folios[chosen], self._space
            measured = measure(space, space.vmas(), self._plan.scope, addresses=folios.address, orders=folios.order)
            self._measured[key] = measured.planned
        return self._measured[key]

    def _sentence(self, limits: dict[int, Limit], supply: Supply) -> str:
        """Return the limit of the largest folios that are not all made, as a clause."""
        for order, limit in limits.items():
            label = self._geometry.label(order)
            if limit is Limit.ROOM:
                return self._room.reason
            if limit is Limit.KEPT:
                spare = format_size(supply.free.spare * self._geometry.page_size)
                return f"{spare} are free above the kernel's own reserve (min_free_kbytes)"
            if limit is Limit.FOLIOS and supply.compacted:
                return f"no {label} of movable memory is free, even after compaction"
            if limit is Limit.FOLIOS:
                return f"no free folio of {label} is left"
        return "nothing: there is memory for all planned folios"


def _beside(trim: TrimPlan, plan: SpacePlan) -> TrimPlan:
    """Return the folios of `trim` in which `plan` makes no folios."""
    addresses = np.array([address for address, _ in trim.folios], np.uint64)
    at = np.searchsorted(plan.folios.address, addresses, side="right") - 1
    ends = plan.folios.ends(plan.geometry)
    kept = [row for row, below in enumerate(at.tolist()) if below < 0 or ends[below] <= addresses[row]]
    return replace(
        trim,
        folios=[trim.folios[row] for row in kept],
        zero=[trim.zero[row] for row in kept],
        gains=[trim.gains[row] for row in kept],
    )


def _without(coverage: Coverage, trim: TrimPlan) -> Coverage:
    """Return a coverage after the folios of `trim` are trimmed."""
    pages = np.array(coverage.pages, np.int64)
    for (address, order), zero, gain in zip(trim.folios, trim.zero, trim.gains, strict=True):
        left = in_use(zero, trim.geometry.page_size) if trim.by == "split" else np.zeros(len(zero), np.int8)
        pages[0] -= gain
        for smaller in range(1, order + 1):
            if address % trim.geometry.size_of(smaller) == 0:
                pages[smaller] += int((left >= smaller).sum()) - (1 << order)
    return replace(coverage, pages=tuple(np.maximum(pages, 0).tolist()))


@dataclass(frozen=True)
class _Work:
    """The steps that a collapse takes for a plan, in their order.

    Attributes:
        steps: the blocks and pages of each step.
        step_of: intp, shape (folios,): index of the step of each folio of the plan.
        begins, pages: uint64 and int64, shape (steps,): start address of each step's memory, and its pages.
    """

    steps: Steps
    step_of: NDArray[np.intp]
    begins: NDArray[np.uint64]
    pages: NDArray[np.int64]


def _work_of(space: AddressSpace, plan: SpacePlan, means: Means) -> _Work:
    """Return the steps that make a plan: one for each folio, but for splits one for each PMD range."""
    folios, geometry, count = plan.folios, plan.geometry, len(plan.folios)
    begins, taken = folios.address.copy(), folios.order.astype(np.int64)
    rank = np.empty(count, np.int64)
    rank[plan.ranking(folios)] = np.arange(count)
    split = np.isin(folios.order, made_by(mechanisms_of(space, plan, means), "split"))
    begins[split] = begins[split] // np.uint64(geometry.pmd_size) * np.uint64(geometry.pmd_size)
    taken[split] = geometry.pmd_order
    rank[split] = count + plan.range_ranks(folios[split])
    # The largest first, and splits after the folios of the PMD order.
    key = (taken.max(initial=0) - taken) * (2 * count + 1) + rank
    _, first, step_of = np.unique(key, return_index=True, return_inverse=True)
    filled = np.bincount(step_of, folios.filled, len(first)).astype(np.int64)
    pages = np.int64(1) << taken[first]
    contents = np.where(split[first], resident_in(plan, begins[first]), pages - filled)
    holes = np.maximum(pages - contents - filled, 0)
    return _Work(Steps(taken[first].astype(np.int8), contents, holes, filled), step_of, begins[first], pages)


@dataclass(frozen=True)
class _Frames:
    """The frames of the steps' memory.

    Attributes:
        merged: by order, the blocks that become completely free with each step: int64, shape (steps,).
        sure: int64, shape (steps,): pages in page blocks that contain only pages of steps, so that all are movable.
    """

    merged: dict[int, NDArray[np.int64]]
    sure: NDArray[np.int64]


def _frames(space: AddressSpace, work: _Work) -> _Frames:
    """Return the present frames of some steps; all counts are 0 if frames cannot be read."""
    page_size, pmd_order = space.geometry.page_size, space.geometry.pmd_order
    by_address = np.argsort(work.begins)
    begins, pages = work.begins[by_address], work.pages[by_address]
    segments = [
        (start, start + count * page_size) for start, count in zip(begins.tolist(), pages.tolist(), strict=True)
    ]
    firsts = (begins // np.uint64(page_size)).astype(np.int64)
    frames, at = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    if pages.sum() > MOST_FRAMES:
        segments = []
    for block in in_range_blocks(segments, space.geometry, BLOCK_PAGES * page_size):
        columns = space.read(block)
        if columns.pfn is None:
            break
        own = anonymous_pages(columns) & ~columns.has(Pte.SHARED) & (columns.pfn > 0)
        frames.append(columns.pfn[own].astype(np.int64))
        rows = np.searchsorted(firsts, page_numbers(columns, page_size, np.flatnonzero(own)), side="right") - 1
        at.append(by_address[rows])
    frame, step = np.concatenate(frames), np.concatenate(at)
    merged = {}
    for order in {*np.unique(work.steps.order).tolist(), pmd_order}:
        number, whole = _whole_blocks(frame >> order, order)
        last = np.zeros(len(whole), np.int64)
        np.maximum.at(last, number, step)
        merged[order] = np.bincount(last[whole], minlength=len(begins))
        if order == pmd_order:
            sure = np.bincount(step[whole[number]], minlength=len(begins))
    return _Frames(merged, sure)


def _whole_blocks(blocks: NDArray[np.int64], order: int) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return the number of the block of each frame, and which blocks are complete.

    Args:
        blocks: int64, shape (frames,): the block that each frame lies in.
    """
    _, number, frames = np.unique(blocks, return_inverse=True, return_counts=True)
    return number, frames == 1 << order
