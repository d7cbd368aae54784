"""Optional abilities of address spaces: each a small protocol, and a function that works for any address space.

:class:`~mthp.addrspace.AddressSpace` has the methods of every backend. A recorded snapshot has no threads, and only
the kernel knows the nodes of a mapping, so a backend implements those protocols here that it can. Callers use the
functions, which have a default for all other backends. A method returns the same as the function of its name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace
from mthp.budget import MemoryBound
from mthp.errors import UnsupportedError
from mthp.freememory import FreeMemory, MemoryBlocks
from mthp.heat import Heat, HeatRequest, parse_heat
from mthp.heatfile import read_heat
from mthp.means import Means
from mthp.ptes import Pte, PteColumns, Segment, in_portions, in_range_portions
from mthp.vma import Vma

Accesses = Callable[[], Iterable[NDArray[np.int64]]]
"""Yields the page numbers of a trace, in order, from its beginning: int64, shape (accesses,), in parts."""

READ_PORTION = 256 << 20
"""Bytes of address space per read when all of it is read."""


@runtime_checkable
class Threaded(Protocol):
    """An address space in which threads run."""

    def threads(self) -> int: ...


def threads(space: AddressSpace) -> int:
    """Return the number of threads that run in `space`; 1 if it is not :class:`Threaded`."""
    return space.threads() if isinstance(space, Threaded) else 1


@runtime_checkable
class StopsThreads(Protocol):
    """An address space with threads that are stopped at times."""

    def take_pauses(self) -> list[int]: ...


def take_pauses(space: AddressSpace) -> list[int]:
    """Return how long the threads of `space` were stopped, in nanoseconds, for each window since the last call."""
    return space.take_pauses() if isinstance(space, StopsThreads) else []


@runtime_checkable
class Timed(Protocol):
    """An address space that measures kernel calls made for several blocks together."""

    def take_calls(self) -> list[int]: ...


def take_calls(space: AddressSpace) -> list[int]:
    """Return the durations of kernel calls made for several blocks together since the last time, in nanoseconds.

    Calls for single blocks are in the outcomes of the blocks.
    """
    return space.take_calls() if isinstance(space, Timed) else []


@runtime_checkable
class Movable(Protocol):
    """An address space with movable memory."""

    def move_refusals(self, means: Means) -> list[str]: ...


def move_refusals(space: AddressSpace, means: Means) -> list[str]:
    """Return every reason not to move memory of `space` by `means` at this moment, each as a sentence."""
    return space.move_refusals(means) if isinstance(space, Movable) else []


@runtime_checkable
class Hindered(Protocol):
    """An address space that knows what prevents moves, and what pins its pages."""

    def objections(self, vma: Vma | None) -> list[str]: ...
    def pins(self, vma: Vma | None) -> list[str]: ...


def objections(space: AddressSpace, vma: Vma | None) -> list[str]:
    """Return the reasons not to move memory of a mapping, or of the process, each as a sentence.

    Empty for a backend that only reads.
    """
    return space.objections(vma) if isinstance(space, Hindered) else []


def pins(space: AddressSpace, vma: Vma | None) -> list[str]:
    """Return the visible pins of pages of a mapping, or of the process, each as a sentence.

    Empty for a backend that only reads.
    """
    return space.pins(vma) if isinstance(space, Hindered) else []


@runtime_checkable
class Served(Protocol):
    """An address space of a process that is a part of a pod, a container or a service."""

    @property
    def service(self) -> str: ...


def service(space: AddressSpace) -> str:
    """Return the pod, container or service of `space`, as it is written in a target; ``""`` if unknown."""
    return space.service if isinstance(space, Served) else ""


@runtime_checkable
class ShowsPmdEntries(Protocol):
    """An address space that may know which pages PMD entries map, though it does not see the folios."""

    def shows_pmd_entries(self) -> bool: ...


def shows_pmd_entries(space: AddressSpace) -> bool:
    """Return whether `space` knows which pages PMD entries map, though it does not see the folios."""
    return isinstance(space, ShowsPmdEntries) and space.shows_pmd_entries()


@runtime_checkable
class Limited(Protocol):
    """An address space with memory that counts against limits."""

    def memory_bounds(self) -> list[MemoryBound]: ...


def memory_bounds(space: AddressSpace) -> list[MemoryBound]:
    """Return the limits that new memory of `space` counts against, with their present use."""
    return space.memory_bounds() if isinstance(space, Limited) else []


@runtime_checkable
class OnMachine(Protocol):
    """An address space on a machine whose free memory is known."""

    def free_memory(self) -> FreeMemory | None: ...

    def memory_blocks(self, free: FreeMemory) -> MemoryBlocks | None: ...


def free_memory(space: AddressSpace) -> FreeMemory | None:
    """Return the free memory of the machine of `space`; None if unknown."""
    return space.free_memory() if isinstance(space, OnMachine) else None


def memory_blocks(space: AddressSpace, free: FreeMemory) -> MemoryBlocks | None:
    """Return the contents of the memory of the machine of `space`, in blocks of the PMD order; None if unknown.

    Args:
        free: the machine's free memory, read before.
    """
    return space.memory_blocks(free) if isinstance(space, OnMachine) else None


@runtime_checkable
class Resident(Protocol):
    """An address space with a resident size that the kernel counts."""

    def resident_bytes(self) -> int: ...


def resident_bytes(space: AddressSpace) -> int:
    """Return the resident bytes of `space`."""
    if isinstance(space, Resident):
        return space.resident_bytes()
    pages = 0
    for portion in in_portions(space.populated(space.mapped(), space.geometry.pmd_size), READ_PORTION):
        columns = space.read(portion)
        pages += int((columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO)).sum())
    return pages * space.geometry.page_size


@runtime_checkable
class Counting(Protocol):
    """An address space on a machine that has counters."""

    def counters(self) -> dict[str, int]: ...


def counters(space: AddressSpace) -> dict[str, int]:
    """Return the machine's counters of the target (``minflt``, ``majflt``) and of folios, by name.

    Counters of folio sizes have their path below sysfs as name: ``hugepages-64kB/anon_fault_alloc``.
    """
    return space.counters() if isinstance(space, Counting) else {}


@runtime_checkable
class Traced(Protocol):
    """An address space that may have been recorded from a trace of accesses."""

    def accesses(self) -> Accesses | None: ...


def accesses(space: AddressSpace) -> Accesses | None:
    """Return the trace that `space` was recorded from; None if it was recorded otherwise."""
    return space.accesses() if isinstance(space, Traced) else None


@runtime_checkable
class OnNodes(Protocol):
    """An address space with pages on NUMA nodes."""

    def with_nodes(self, vmas: Sequence[Vma]) -> list[Vma]: ...


def with_nodes(space: AddressSpace, vmas: Sequence[Vma]) -> list[Vma]:
    """Return `vmas` with their `node_pages` if known. It takes about as long as listing them."""
    return space.with_nodes(vmas) if isinstance(space, OnNodes) else list(vmas)


@runtime_checkable
class WithContents(Protocol):
    """An address space with readable page contents."""

    def zero_filled(self, columns: PteColumns) -> NDArray[np.bool_]: ...


def zero_filled(space: AddressSpace, columns: PteColumns) -> NDArray[np.bool_]:
    """Return which present pages of `columns`, as just read, contain only zeroes: bool, shape (pages,).

    False for a page that went away in the meantime.

    Raises:
        UnsupportedError: `space` has no contents, or this kernel cannot tell.
    """
    if isinstance(space, WithContents):
        return space.zero_filled(columns)
    raise UnsupportedError(
        f"{space.label} has no contents, so pages of zeroes cannot be found",
        help="use the running process",
    )


@runtime_checkable
class HeatMeasured(Protocol):
    """An address space with accesses that can be measured as they happen."""

    def measure_heat(self, request: HeatRequest, stop: Callable[[], bool]) -> Heat:
        """Measure accesses for the time that `request` names, or until `stop` returns True, and return them.

        Raises:
            TargetVanishedError: the process is gone.
            UnsupportedError: nothing here measures accesses, or not the source that `request` names.
            NotPermittedError: the rights do not suffice.
        """


@runtime_checkable
class HeatRecorded(Protocol):
    """A recorded address space, perhaps with its heat."""

    @property
    def recorded_heat(self) -> Heat | None:
        """The accesses seen while it was recorded; None if none were."""


AnyHeat = Heat | HeatRequest | str | os.PathLike[str] | None
"""Heat, or its source: a text has the syntax of ``--heat``."""


def heat_of(space: AddressSpace, wanted: AnyHeat = None, stop: Callable[[], bool] = lambda: False) -> Heat | None:
    """Return the heat of `space` from the source `wanted`, by default what was recorded with it; None without any.

    Raises:
        UsageError: `wanted` is not a source of heat, or a file that cannot be read.
        UnsupportedError: `space` is not a live process, so nothing can be measured; otherwise as
            :meth:`HeatMeasured.measure_heat`.
    """
    if isinstance(wanted, Heat):
        return wanted
    if wanted is None:
        return space.recorded_heat if isinstance(space, HeatRecorded) else None
    request = wanted if isinstance(wanted, HeatRequest) else parse_heat(wanted)
    if request.path:
        return read_heat(request.path)
    if isinstance(space, HeatMeasured):
        return space.measure_heat(request, stop)
    raise UnsupportedError(
        f"{space.label} is not a live process, so its accesses cannot be measured",
        help="leave heat out to use the recorded accesses, or name a file of heat",
    )


class Watch(Protocol):
    """A repeated reading of an address space that leaves out what has certainly not changed."""

    def look(self, segments: Sequence[Segment]) -> Iterator[PteColumns]:
        """Yield the entries of the PMD ranges in which anything may have changed since the last look.

        The result has every part of `segments` that lies in such a PMD range. Both are by ascending address.
        """
        ...


@runtime_checkable
class Watchable(Protocol):
    """An address space that detects changes without reading everything."""

    def watch(self) -> Watch: ...


def watch(space: AddressSpace) -> Watch:
    """Return the cheapest :class:`Watch` of `space` that its backend has."""
    return space.watch() if isinstance(space, Watchable) else Reading(space)


class Reading:
    """The :class:`Watch` that reads everything."""

    def __init__(self, space: AddressSpace) -> None:
        self._space = space

    def look(self, segments: Sequence[Segment]) -> Iterator[PteColumns]:
        for portion in in_range_portions(segments, self._space.geometry, READ_PORTION):
            yield self._space.read(portion)
