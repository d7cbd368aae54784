"""An address space in memory and a clock, for tests of what stands above the seam."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from mthp.addrspace import AddressSpace
from mthp.errors import TargetVanishedError, UnsupportedError
from mthp.geometry import X86_64, Geometry
from mthp.ptes import ORDER_NONE, Pte, PteColumns, Segment
from mthp.results import BlockOutcome, ScanResult
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma

COLLAPSE_NS = 250_000
"""What every collapse of a :class:`FakeSpace` takes."""


class FakeClock:
    """A clock that the test sets.

    Attributes:
        now: the time.
    """

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class RestingClock:
    """A clock that passes only where time is spent: in rests, and where the test advances it.

    Attributes:
        time: the time.
        rests: the seconds of each rest.
        meanwhile: called at the end of each rest.
    """

    def __init__(self, time: float = 1000.0) -> None:
        self.time = time
        self.rests: list[float] = []
        self.meanwhile: Callable[[], object] = lambda: None

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float, wake: object) -> None:
        assert seconds > 0
        self.rests.append(seconds)
        self.time += seconds
        self.meanwhile()


def page_runs(*runs: tuple[int, int, int]) -> tuple[NDArray[np.uint16], NDArray[np.int8]]:
    """State and folio order of pages, from runs of (pages, bits of Pte, folio order).

    A none PTE is ``(pages, 0, ORDER_NONE)``.
    """
    counts = [pages for pages, _, _ in runs]
    state = np.repeat(np.array([state for _, state, _ in runs], np.uint16), counts)
    folio_order = np.repeat(np.array([order for _, _, order in runs], np.int8), counts)
    return state, folio_order


class FakeSpace(AddressSpace):
    """An address space with columns that a test defines, and that a collapse changes.

    The columns are copied. Overrides of :meth:`read` and :meth:`write` may change them meanwhile, as a live process
    does.

    Args:
        mappings: each mapping with the state and the folio order of all its pages: uint16 and int8, shape (pages,).
        orders: orders that :meth:`collapse` can do, as MADV_COLLAPSE only the PMD order if None.
        fails: addresses at which :meth:`collapse` fails, and how.

    Attributes:
        fails: as given, to change at will.
        attempts: (address, order) of every call of :meth:`collapse`.
        vanished: once set, reading and collapsing raise TargetVanishedError.
        closed: whether :meth:`close` was called.
    """

    def __init__(
        self,
        mappings: Iterable[tuple[Vma, NDArray[np.uint16], NDArray[np.int8]]],
        *,
        geometry: Geometry = X86_64,
        label: str = "4711 (fake)",
        kernel: str = "6.18.0-fake",
        switches: Switches | None = None,
        tunables: Tunables | None = None,
        thp_disabled: bool = False,
        missing: tuple[str, ...] = (),
        orders: Iterable[int] | None = None,
        fails: Mapping[int, ScanResult] | None = None,
    ) -> None:
        self._mappings = sorted(
            ((vma, state.copy(), folio_order.copy()) for vma, state, folio_order in mappings), key=lambda m: m[0].start
        )
        for vma, state, folio_order in self._mappings:
            assert len(state) == len(folio_order) == vma.size // geometry.page_size, f"columns do not fit {vma}"
        self._geometry = geometry
        self._label = label
        self._kernel = kernel
        self._switches = switches or Switches.defaults(geometry)
        self._tunables = tunables or Tunables.defaults(geometry)
        self._thp_disabled = thp_disabled
        self._missing = missing
        self._orders = {geometry.pmd_order} if orders is None else set(orders)
        self.fails = dict(fails or {})
        self.attempts: list[tuple[int, int]] = []
        self.vanished = False
        self.closed = False

    @property
    def geometry(self) -> Geometry:
        return self._geometry

    @property
    def label(self) -> str:
        return self._label

    @property
    def kernel(self) -> str:
        return self._kernel

    @property
    def switches(self) -> Switches:
        return self._switches

    @property
    def tunables(self) -> Tunables:
        return self._tunables

    @property
    def thp_disabled(self) -> bool:
        return self._thp_disabled

    @property
    def missing(self) -> tuple[str, ...]:
        return self._missing

    def vmas(self) -> list[Vma]:
        self._check_alive()
        return [vma for vma, _, _ in self._mappings]

    def read(self, segments: Sequence[Segment]) -> PteColumns:
        self._check_alive()
        parts = [self._read_one(start, end) for start, end in segments]
        state = np.concatenate([part[0] for part in parts] or [np.empty(0, np.uint16)])
        folio_order = np.concatenate([part[1] for part in parts] or [np.empty(0, np.int8)])
        return PteColumns(tuple(segments), state, folio_order)

    def write(self, address: int, state: NDArray[np.uint16] | int, folio_order: int, pages: int = 1) -> None:
        """Set the entries of `pages` pages from `address` on, all in one mapping."""
        self._set(address, pages, int(state) if isinstance(state, int) else state, folio_order)

    def populated(self, segments: Sequence[Segment], granule: int) -> list[Segment]:
        found: list[Segment] = []
        for start, end in segments:
            if start == end:
                continue
            first = start // granule * granule
            # From the start on: addresses above 1 << 63 are no int64.
            offsets = np.maximum(np.arange(first - start, end - start, granule), 0) // self._geometry.page_size
            used = np.flatnonzero(np.logical_or.reduceat(self._read_one(start, end)[0] != 0, offsets))
            for run in np.split(used, np.flatnonzero(np.diff(used) > 1) + 1) if len(used) else ():
                low, high = first + int(run[0]) * granule, first + (int(run[-1]) + 1) * granule
                found.append((max(low, start), min(high, end)))
        return found

    def attempt(self, address: int, order: int) -> BlockOutcome:
        self._check_alive()
        if order not in self._orders:
            raise UnsupportedError(f"order {order} cannot be collapsed to here", help="needs the move mechanism")
        self.attempts.append((address, order))
        return BlockOutcome(address, order, self._collapse(address, order), elapsed_ns=COLLAPSE_NS)

    def close(self) -> None:
        self.closed = True

    def _collapse(self, address: int, order: int) -> ScanResult:
        if address in self.fails:
            return self.fails[address]
        geometry = self._geometry
        if address % geometry.size_of(order):
            return ScanResult.VMA_CHECK
        vma = next((vma for vma, _, _ in self._mappings if vma.start <= address < vma.end), None)
        if vma is None:
            return ScanResult.VMA_NULL
        # Aligned to its size, so that it lies in the PMD range if it is one; below that order only the mover gets here.
        if address + geometry.size_of(order) > vma.end:
            return ScanResult.ADDRESS_RANGE
        state, folio_order = self._read_one(address, address + geometry.size_of(order))
        if not (state & Pte.PRESENT).any():
            return ScanResult.NO_PTE_TABLE
        # MADV_COLLAPSE succeeds on a range that is huge already.
        mapped = Pte.PRESENT | Pte.PMD_MAPPED if order == geometry.pmd_order else Pte.PRESENT
        if not (folio_order >= order).all() or not (state & mapped == mapped).all():
            self._set(address, 1 << order, mapped, order)
        return ScanResult.SUCCEED

    def _read_one(self, start: int, end: int) -> tuple[NDArray[np.uint16], NDArray[np.int8]]:
        """Return a copy of the columns from `start` to `end`, none where no mapping is."""
        page_size = self._geometry.page_size
        pages = (end - start) // page_size
        state, folio_order = np.zeros(pages, np.uint16), np.full(pages, ORDER_NONE, np.int8)
        for vma, its_state, its_order in self._mappings:
            low, high = max(start, vma.start), min(end, vma.end)
            if low < high:
                there = slice((low - start) // page_size, (high - start) // page_size)
                here = slice((low - vma.start) // page_size, (high - vma.start) // page_size)
                state[there], folio_order[there] = its_state[here], its_order[here]
        return state, folio_order

    def _set(self, address: int, pages: int, state: NDArray[np.uint16] | int, folio_order: int) -> None:
        vma, its_state, its_order = next(m for m in self._mappings if m[0].start <= address < m[0].end)
        first = (address - vma.start) // self._geometry.page_size
        its_state[first : first + pages] = state
        its_order[first : first + pages] = folio_order

    def _check_alive(self) -> None:
        if self.vanished:
            raise TargetVanishedError(f"{self._label} exited")
