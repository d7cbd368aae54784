"""The three looks at a process, from cheap to expensive, and the look at the mappings of one address space."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import NoReturn

import numpy as np

from mthp.addrspace import AddressSpace
from mthp.engine.census import PageCounts, take_census
from mthp.engine.planning import plan_space
from mthp.engine.select import PlanOptions
from mthp.engine.space_plan import SpacePlan
from mthp.errors import MthpError, TargetVanishedError
from mthp.geometry import Geometry
from mthp.targets import open_target
from mthp.top.model import UNKNOWN, Row
from mthp.vma import VmaKind

Stop = Callable[[], bool]


class NotWantedError(Exception):
    """The caller no longer wants the result."""


def first_look(proc: str = "/proc") -> Iterator[Row]:
    """Yield every process that has memory, from ``statm`` and ``comm``: some ten microseconds each."""
    page = os.sysconf("SC_PAGE_SIZE")
    own = os.getpid()
    with os.scandir(proc) as listing:
        # Listed at once, because the caller may stop iterating and would leave the directory open.
        entries = list(listing)
    for entry in entries:
        if not entry.name.isdigit():
            continue
        try:
            with open(f"{entry.path}/statm", "rb") as file:
                _, resident, shared, *_ = map(int, file.read().split())
            if not resident:
                # Kernel threads and exiting processes have no memory.
                continue
            with open(f"{entry.path}/comm", "rb") as file:
                comm = file.read().decode(errors="replace").rstrip("\n")
        except (OSError, ValueError):
            continue
        pid = int(entry.name)
        name = f"{comm} (this mthp)" if pid == own else comm
        # Memory neither of a file nor shared is anonymous (proc_pid_statm(5)). statm does not have its huge share.
        anonymous = max(0, resident - shared) * page
        yield Row(pid, name, resident * page, anonymous)


def second_look(row: Row, proc: str = "/proc") -> Row:
    """Return `row` with the values of ``smaps_rollup``, for which the kernel walks the whole process."""
    try:
        with open(f"{proc}/{row.key}/smaps_rollup", "rb") as file:
            # In kB (proc_pid_smaps(5)).
            fields = {name: int(rest.split()[0]) << 10 for name, rest in _fields(file.read())}
    except PermissionError as error:
        return dataclasses.replace(row, trouble=f"not permitted to read it ({error.strerror}): run as root")
    except (OSError, ValueError, IndexError) as error:
        raise TargetVanishedError(f"process {row.key} is gone") from error
    anonymous, huge = fields.get("Anonymous", 0), fields.get("AnonHugePages", 0)
    return dataclasses.replace(
        row,
        resident=fields.get("Rss", row.resident),
        anonymous=anonymous,
        huge=huge,
        # An upper bound, because no plan was made.
        gain=max(0, anonymous - huge),
        trouble="",
    )


def _fields(text: bytes) -> Iterator[tuple[str, bytes]]:
    # Without the first line, which is the range of addresses.
    for line in text.splitlines()[1:]:
        name, _, rest = line.partition(b":")
        yield name.decode(), rest


def third_look(row: Row, options: PlanOptions, stop: Stop = lambda: False) -> Row:
    """Return `row` with a census of its pages and a plan. An error becomes the row's `trouble`.

    Raises:
        Stopped: `stop` returned True.
    """
    try:
        with open_target(row.key) as space:
            census = take_census(space, _watched(stop))
            plan = plan_space(space, options, _watched(stop))
    except TargetVanishedError:
        raise
    except MthpError as error:
        return dataclasses.replace(row, trouble=error.message)
    pages, geometry = census.anonymous, space.geometry
    return dataclasses.replace(
        row,
        resident=census.total.resident * geometry.page_size,
        anonymous=pages.resident * geometry.page_size,
        huge=pages.state("pmd_mapped") * geometry.page_size,
        by_order=_bytes_by_order(census.total, geometry),
        # A collapse copies what it brings into larger folios.
        gain=plan.copied_bytes,
        bloat=plan.filled_bytes,
        out_of_reach=pages.out_of_reach_bytes(geometry),
        folios=plan.folios_by_order,
        planned=True,
        trouble="",
    )


def mappings(space: AddressSpace, options: PlanOptions, stop: Stop = lambda: False) -> list[Row]:
    """Return the mappings of `space` that hold any memory, each with its part of the plan.

    Raises:
        Stopped: `stop` returned True.
    """
    census = take_census(space, _watched(stop))
    plan = plan_space(space, options, _watched(stop))
    geometry = space.geometry
    starts = np.array([vma.vma.start for vma in census.vmas], np.uint64)
    shares = _Shares(plan, starts)
    rows = []
    for at, vma in enumerate(census.vmas):
        if not vma.pages.resident and not vma.pages.state("swap"):
            continue
        anonymous = vma.pages.resident * geometry.page_size if vma.vma.kind is VmaKind.ANON else 0
        rows.append(
            Row(
                vma.vma.start,
                vma.vma.name or "anonymous",
                vma.pages.resident * geometry.page_size,
                anonymous,
                huge=vma.pages.state("pmd_mapped") * geometry.page_size,
                by_order=_bytes_by_order(vma.pages, geometry),
                gain=int(shares.copied[at]) * geometry.page_size,
                bloat=int(shares.filled[at]) * geometry.page_size,
                out_of_reach=vma.anonymous.out_of_reach_bytes(geometry),
                folios=shares.folios(at),
                planned=True,
                trouble="" if vma.madvise else vma.madvise.reason,
            )
        )
    return rows


class _Shares:
    """The share of each mapping in a plan, in pages: int64, shape (mappings,)."""

    def __init__(self, plan: SpacePlan, starts: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> None:
        # The last mapping that begins at or below the range.
        mapping = np.searchsorted(starts, plan.ranges.address, side="right") - 1
        self.copied = np.bincount(mapping, weights=plan.ranges.copied, minlength=len(starts)).astype(np.int64)
        self.filled = np.bincount(mapping, weights=plan.ranges.filled, minlength=len(starts)).astype(np.int64)
        self._orders = plan.folios.order
        self._whose = np.searchsorted(starts, plan.folios.address, side="right") - 1

    def folios(self, at: int) -> dict[int, int]:
        counts = np.bincount(self._orders[self._whose == at], minlength=1)
        return {int(order): int(counts[order]) for order in np.flatnonzero(counts)[::-1]}


def _bytes_by_order(pages: PageCounts, geometry: Geometry) -> dict[int, int]:
    sizes = {order: count * geometry.page_size for order, count in pages.by_order().items()}
    return sizes | ({UNKNOWN: pages.unknown * geometry.page_size} if pages.unknown else {})


def _watched(stop: Stop) -> Callable[[int, int], None]:
    def watch(_done: int, _total: int) -> None:
        if stop():
            _stopped()

    return watch


def _stopped() -> NoReturn:
    raise NotWantedError
