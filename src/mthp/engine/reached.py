"""The part of a plan that memory allows (:mod:`mthp.engine.reach`), and the resulting coverage."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mthp.abilities import free_memory, memory_blocks
from mthp.addrspace import AddressSpace
from mthp.budget import Room
from mthp.engine.admission import room_of
from mthp.engine.allowed import made_by, mechanisms_of
from mthp.engine.packing import Freed, Packing, Trimmed
from mthp.engine.reach import Limit, Steps, Supply, reachable
from mthp.engine.space_plan import SpacePlan
from mthp.engine.splitprice import resident_in
from mthp.engine.trim import TrimOptions, TrimPlan, plan_trim
from mthp.errors import NotPermittedError, UnsupportedError
from mthp.freememory import TAIL, FreeMemory, MemoryBlocks
from mthp.means import Means
from mthp.measuring import PORTION_PAGES, measure
from mthp.metrics import Coverage, anonymous_pages, page_numbers
from mthp.progress import StepProgress
from mthp.ptes import Pte, in_range_portions
from mthp.trimming import given_back, in_use
from mthp.units import format_size

MOST_PLANNED_FRAMES = 1 << 24
"""Pages of a plan up to which their frames are looked up, 64 GiB on x86-64. It takes some 50 bytes for each; in larger
plans the blocks that come free as a whole are left out, so what is predicted is less than what is reached."""

NO_BLOCKS = "not known: /proc/kpageflags cannot be read, run it as root"


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
        compacted: with compaction of all memory (``/proc/sys/vm/compact_memory``) whenever no free folio is left.
        trimmed: as `compacted`, after zeroes in large folios that the plan leaves alone were given back.
    """

    JSON: ClassVar = "now after_compaction=compacted after_trim=trimmed"

    now: Reached
    compacted: Reached
    trimmed: Reached


def reach_of(space: AddressSpace, plan: SpacePlan, means: Means, progress: StepProgress | None = None) -> Reach:
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
    blocks = memory_blocks(space, free)
    now = reaching.reached(free, blocks, compacted=False)
    if blocks is None:
        return Reach(now, Reached.unknown(NO_BLOCKS), Reached.unknown(NO_BLOCKS))
    compacted = reaching.reached(free, blocks)
    try:
        trim = plan_trim(space, TrimOptions(), progress)
    except (UnsupportedError, NotPermittedError) as error:
        return Reach(now, compacted, Reached.unknown(f"not known: {error.message}"))
    if trim.by is None:
        return Reach(now, compacted, Reached.unknown("folios cannot be trimmed here: mthp doctor says what it takes"))
    return Reach(now, compacted, reaching.reached(free, blocks, trim=_beside(trim, plan)))


class _Reaching:
    """The steps of a plan, and the memory that they may take."""

    def __init__(self, space: AddressSpace, plan: SpacePlan, means: Means) -> None:
        self._space, self._plan, self._geometry = space, plan, plan.geometry
        self._work = _work_of(space, plan, means)
        self._room: Room = room_of(space, means)
        self._frames: Freed | None = None
        self._measured: dict[bytes, Coverage] = {}

    def reached(
        self, free: FreeMemory, blocks: MemoryBlocks | None, *, compacted: bool = True, trim: TrimPlan | None = None
    ) -> Reached:
        """Return the part that is reached.

        Args:
            free: the machine's free memory.
            blocks: its memory in blocks of the PMD order; None if unknown.
            compacted: whether it is compacted, which takes `blocks`.
            trim: large folios that are trimmed before.
        """
        page_size = self._geometry.page_size
        given_back = 0 if trim is None else sum(trim.gains)
        room = None if self._room.spare is None else self._room.spare // page_size + given_back
        supply = Supply(free.plus(given_back), room, hidden=free.unlisted, room_of_machine=self._room.of_machine)
        done, limits = reachable(self._work.steps, supply)
        if set(limits.values()) - {Limit.NOTHING}:
            # Frames are read only if the result depends on them.
            supply = self._with_frames(supply, free, blocks, compacted, trim)
            done, limits = reachable(self._work.steps, supply)
        chosen = done[self._work.step_of]
        if supply.packing is not None:
            small = np.flatnonzero(chosen & (self._plan.folios.order < self._geometry.pmd_order))
            chosen[small[: round(len(small) * supply.packing.broken)]] = False
        coverage = self._coverage(chosen)
        if trim is not None:
            coverage = _without(coverage, trim, 0 if supply.packing is None else supply.packing.emptied)
        return Reached(
            coverage.share(self._plan.coverage_order),
            int((np.int64(page_size) << self._plan.folios.order[chosen].astype(np.int64)).sum()),
            replace(self._plan, folios=self._plan.folios[chosen]).folios_by_order,
            self._sentence(limits, supply),
        )

    def _with_frames(
        self, supply: Supply, free: FreeMemory, blocks: MemoryBlocks | None, compacted: bool, trim: TrimPlan | None
    ) -> Supply:
        """Return `supply` with what follows from the frames of the target."""
        if self._frames is None:
            self._frames = _frames(self._space, self._work)
        if blocks is None or not compacted:
            return replace(supply, merged=_merged(self._frames, self._work.steps, blocks))
        trimmed = None if trim is None else _trimmed(self._space, trim)
        return replace(supply, packing=Packing(free, blocks, self._frames, trimmed))

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
            if limit is Limit.FOLIOS and supply.packing:
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


def _without(coverage: Coverage, trim: TrimPlan, emptied: int) -> Coverage:
    """Return a coverage after the folios of `trim` are trimmed, and after `emptied` more of their pages are freed."""
    pages = np.array(coverage.pages, np.int64)
    pages[0] -= emptied
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
    smallest = taken[first].copy()
    np.minimum.at(smallest, step_of, folios.order.astype(np.int64))
    steps = Steps(taken[first].astype(np.int8), smallest.astype(np.int8), holes, filled)
    return _Work(steps, step_of, begins[first], pages)


def _merged(freed: Freed, steps: Steps, blocks: MemoryBlocks | None) -> dict[int, NDArray[np.int64]]:
    """Return by order the blocks that become completely free with each step: int64, shape (steps,).

    Args:
        blocks: the machine's memory; None if unknown, then only blocks that lie in frames of steps are counted.
    """
    merged = {}
    for order in np.unique(steps.order).tolist():
        ids, number, frames = np.unique(freed.frame >> order, return_inverse=True, return_counts=True)
        known = blocks is not None and order <= blocks.order
        whole = frames + (blocks.free_in(ids, order) if blocks is not None and known else 0) == 1 << order
        last = np.zeros(len(ids), np.int64)
        np.maximum.at(last, number, freed.step)
        merged[order] = np.bincount(last[whole], minlength=len(steps))
    return merged


def _frames(space: AddressSpace, work: _Work) -> Freed:
    """Return the present frames of some steps; none if frames cannot be read."""
    page_size = space.geometry.page_size
    by_address = np.argsort(work.begins)
    begins, pages = work.begins[by_address], work.pages[by_address]
    segments = [
        (start, start + count * page_size) for start, count in zip(begins.tolist(), pages.tolist(), strict=True)
    ]
    firsts = (begins // np.uint64(page_size)).astype(np.int64)
    frames, at = [np.empty(0, np.int64)], [np.empty(0, np.intp)]
    if pages.sum() > MOST_PLANNED_FRAMES:
        segments = []
    for portion in in_range_portions(segments, space.geometry, PORTION_PAGES * page_size):
        columns = space.read(portion)
        if columns.pfn is None:
            break
        own = anonymous_pages(columns) & ~columns.has(Pte.SHARED) & (columns.pfn > 0)
        frames.append(columns.pfn[own].astype(np.int64))
        rows = np.searchsorted(firsts, page_numbers(columns, page_size, np.flatnonzero(own)), side="right") - 1
        at.append(by_address[rows])
    return Freed(np.concatenate(frames), np.concatenate(at))


def _trimmed(space: AddressSpace, trim: TrimPlan) -> Trimmed:
    """Return the pages of the folios of `trim`."""
    page_size, by = space.geometry.page_size, trim.by or "split"
    chosen = sorted(zip(trim.folios, trim.zero, strict=True), key=lambda folio: folio[0])
    pfn = space.read([(address, address + page_size) for (address, _), _ in chosen]).pfn
    none = np.empty(0, np.bool_)
    frames, freed, folios, zeroes = [none.astype(np.int64)], [none], [none.astype(np.int8)], [none]
    for head, (_, zero) in zip([] if pfn is None else pfn.tolist(), chosen, strict=False):
        if not head:
            # It was unmapped since.
            continue
        left = in_use(zero, page_size) if by == "split" else np.zeros(len(zero), np.int8)
        first = np.arange(len(zero)) % (np.int64(1) << left.astype(np.int64)) == 0
        frames.append(head + np.arange(len(zero)))
        freed.append(given_back(zero, by, page_size))
        folios.append(np.where(first, left, TAIL).astype(np.int8))
        zeroes.append(zero)
    return Trimmed(np.concatenate(frames), np.concatenate(freed), np.concatenate(folios), np.concatenate(zeroes))
