"""A large folio divided into a layout: writes to the file, and the outcome of refusals at every step."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from mthp.errors import TargetVanishedError
from mthp.geometry import GEOMETRIES, X86_64, Geometry
from mthp.linux import abi
from mthp.linux.split.divide import PAUSES, FolioDivider, LargeFolio
from mthp.linux.split.writes import Part

START, PFN, PID = 1 << 40, 1 << 20, 77


@dataclass
class Machine:
    """A PMD folio of a process, and the kernel that splits it: the process, its tables, kpageflags and the file.

    Attributes:
        orders: of the folio that each page lies in.
        mapped: which pages the process maps.
        writes: to the file: page, order and page to split around.
        skips: asked before each split; True if the kernel does nothing, and says it did.
        error: errno of writes.
        cold: whether MADV_COLD splits.
    """

    geometry: Geometry = X86_64
    knows_offset: bool = False
    skips: Callable[[int], bool] = lambda number: False
    error: int = 0
    cold: bool = True
    alive: bool = True
    writes: list[tuple[int, int, int | None]] = field(default_factory=list)
    cooled: list[int] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)
    pid: int = PID

    def __post_init__(self) -> None:
        pages = self.geometry.ptes_per_pmd
        self.orders = np.full(pages, self.geometry.pmd_order, np.int8)
        self.mapped = np.ones(pages, np.bool_)

    @property
    def folio(self) -> LargeFolio:
        return LargeFolio(START, PFN, self.geometry.pmd_order)

    def divider(self, *, file: bool = True, offset: bool | None = None) -> FolioDivider:
        knows = self.knows_offset if offset is None else offset
        me = cast(Any, self)
        frames, sleep = cast(Any, Frames(self)), self.pauses.append
        return FolioDivider(me, self.geometry, me, frames, me if file else None, offset=knows, sleep=sleep)

    # The process.

    def check_alive(self) -> None:
        if not self.alive:
            raise TargetVanishedError("gone")

    check_memory = check_alive

    def advise(self, address: int, size: int, advice: int) -> int:
        assert (size, advice) == (self.geometry.page_size, abi.MADV_COLD)
        page = (address - START) // self.geometry.page_size
        self.cooled.append(page)
        if self.cold and self.orders[page]:
            self._divide(page, 0, None)
        return 0

    # Its pagemap.

    def word(self, address: int) -> int:
        page = (address - START) // self.geometry.page_size
        return abi.PM_PRESENT | PFN + page if self.mapped[page] else 0

    def read(self, segments: list[tuple[int, int]]) -> NDArray[np.uint64]:
        ((start, end),) = segments
        size = self.geometry.page_size
        return np.array([self.word(address) for address in range(start, end, size)], np.uint64)

    # The file.

    def split(self, pid: int, address: int, page_size: int, order: int, at: int | None = None) -> int:
        assert (pid, page_size) == (PID, self.geometry.page_size)
        page = (address - START) // page_size
        self.writes.append((page, order, at))
        if self.error:
            return self.error
        if order < self.orders[page] and order != 1 and not self.skips(len(self.writes)):
            self._divide(page, order, at if self.knows_offset else None)
        return 0

    def _divide(self, page: int, order: int, at: int | None) -> None:
        size = 1 << int(self.orders[page])
        first = page // size * size
        if at is None:
            self.orders[first : first + size] = order
            return
        around, now = first + at, int(self.orders[page])
        while now > order:
            now -= 1
            half = around >> now << now
            whole = half >> now + 1 << now + 1
            self.orders[whole : whole + (2 << now)] = now

    def close(self) -> None:
        """Nothing is open."""


class Frames:
    """The machine's kpageflags."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine

    def word(self, pfn: int) -> int:
        page = pfn - PFN
        if not 0 <= page < len(self._machine.orders):
            return abi.KPF_COMPOUND_HEAD
        order = int(self._machine.orders[page])
        if not order:
            return 0
        return abi.KPF_COMPOUND_TAIL if page % (1 << order) else abi.KPF_COMPOUND_HEAD

    def close(self) -> None:
        """Nothing is open."""


def layout_of(*orders: int, geometry: Geometry = X86_64) -> NDArray[np.int8]:
    """Folios one after another, and base pages after the last."""
    layout = np.zeros(geometry.ptes_per_pmd, np.int8)
    at = 0
    for order in orders:
        layout[at : at + (1 << order)] = order
        at += 1 << order
    return layout


def random_layout(rng: random.Random, geometry: Geometry) -> NDArray[np.int8]:
    layout = np.zeros(geometry.ptes_per_pmd, np.int8)

    def place(first: int, order: int) -> None:
        if order < 2:
            return
        if order < geometry.pmd_order and rng.random() < 0.35:
            layout[first : first + (1 << order)] = order
        elif rng.random() < 0.9:
            place(first, order - 1)
            place(first + (1 << order - 1), order - 1)

    place(0, geometry.pmd_order)
    return layout


def test_each_part_takes_one_write_of_one_page_the_largest_order_first() -> None:
    machine = Machine()
    assert machine.divider().divide(machine.folio, layout_of(8, 7, 6)) == []
    assert machine.writes == [(0, 8, None), (256, 7, None), (384, 6, None), (448, 0, None)]
    assert (machine.orders == layout_of(8, 7, 6)).all()


def test_what_is_to_be_base_pages_stays_whole_until_one_write() -> None:
    layout = layout_of()
    layout[160:176] = 4
    machine = Machine(knows_offset=True)
    assert machine.divider().divide(machine.folio, layout) == []
    assert (machine.orders == layout).all()
    # One for the block, and one for each half on the way to it; equal parts would be 32.
    assert machine.writes[0] == (0, 4, 160)
    assert len(machine.writes) == 6
    machine = Machine()
    assert machine.divider().divide(machine.folio, layout) == []
    assert len(machine.writes) < 16


def test_where_the_kernel_knows_the_page_one_write_makes_a_buddy_layout() -> None:
    machine = Machine(knows_offset=True)
    layout = layout_of(7, 6, 4, 4, 5, 8)
    assert machine.divider().divide(machine.folio, layout) == []
    assert machine.writes == [(0, 4, 192)]
    assert (machine.orders == layout).all()


def test_a_chain_of_halves_goes_around_its_first_page_too() -> None:
    machine = Machine(knows_offset=True)
    layout = layout_of(4, 4, 5, 6, 7, 8)
    assert machine.divider().divide(machine.folio, layout) == []
    assert machine.writes == [(0, 4, 0)]
    assert (machine.orders == layout).all()


@pytest.mark.parametrize("geometry", [X86_64, *GEOMETRIES.values()], ids=str)
@pytest.mark.parametrize("knows_offset", [False, True])
def test_random_layouts(geometry: Geometry, knows_offset: bool) -> None:
    rng = random.Random(1)
    for _ in range(20):
        machine = Machine(geometry, knows_offset=knows_offset)
        layout = random_layout(rng, geometry)
        assert machine.divider().divide(machine.folio, layout) == []
        assert (machine.orders == layout).all()


@pytest.mark.parametrize("knows_offset", [False, True])
def test_a_write_that_did_nothing_is_repeated_before_anything_smaller_is_written(knows_offset: bool) -> None:
    """A skipped split says that it succeeded; the next smaller order would then take the whole larger folio."""
    rng = random.Random(2)
    for _ in range(200):
        machine = Machine(knows_offset=knows_offset)
        tries = itertools.count()
        # As for a folio that is shared after a fork: every other write does nothing.
        machine.skips = lambda number, tries=tries: next(tries) % 2 == 0  # type: ignore[misc]
        layout = random_layout(rng, machine.geometry)
        assert machine.divider().divide(machine.folio, layout) == []
        assert (machine.orders == layout).all()


@pytest.mark.parametrize("knows_offset", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.8, 1.0])
def test_no_page_comes_to_a_smaller_folio_than_planned_whatever_is_refused(share: float, knows_offset: bool) -> None:
    rng = random.Random(3)
    for _ in range(100):
        machine = Machine(knows_offset=knows_offset)
        machine.skips = lambda number: rng.random() < share
        layout = random_layout(rng, machine.geometry)
        refused = machine.divider().divide(machine.folio, layout)
        assert (machine.orders >= layout).all()
        larger = machine.orders > layout
        inside = np.zeros_like(larger)
        for part in refused:
            inside[part.pages] = True
            assert (machine.orders[part.pages] >= part.order).all()
        assert not (larger & ~inside).any()


def test_a_split_is_tried_again_after_growing_pauses_and_then_given_up() -> None:
    machine = Machine(skips=lambda number: True)
    assert machine.divider().divide(machine.folio, layout_of(8)) == [Part(0, 9)]
    assert machine.writes == [(0, 8, None)] * len(PAUSES)
    assert machine.pauses == list(PAUSES)


def test_an_error_of_the_file_ends_the_tries() -> None:
    machine = Machine(error=1)
    assert machine.divider().divide(machine.folio, layout_of(4)) == [Part(0, 9)]
    assert len(machine.writes) == 1


def test_a_process_that_is_gone_is_told() -> None:
    machine = Machine(alive=False)
    with pytest.raises(TargetVanishedError):
        machine.divider().divide(machine.folio, layout_of(4))
    assert not machine.writes


def test_a_part_whose_first_pages_were_unmapped_is_split_by_another_page() -> None:
    machine = Machine()
    machine.mapped[:20] = False
    layout = layout_of(4, 4, 4)
    assert machine.divider().divide(machine.folio, layout) == []
    # The first block is gone; the split of its rest separates the second.
    assert (machine.orders[32:] == layout[32:]).all()
    assert machine.writes[0][0] == 20


def test_what_was_unmapped_as_a_whole_needs_nothing() -> None:
    machine = Machine()
    machine.mapped[:] = False
    assert machine.divider().divide(machine.folio, layout_of(4)) == []
    assert not machine.writes


def test_base_pages_come_of_the_file_or_of_madv_cold_of_a_hole() -> None:
    holes = np.zeros(512, np.bool_)
    holes[100:200] = True
    machine = Machine()
    assert machine.divider().to_base_pages(machine.folio, Part(0, 9), holes)
    assert (machine.orders == 0).all()
    assert not machine.cooled
    machine = Machine(error=1)
    assert machine.divider().to_base_pages(machine.folio, Part(0, 9), holes)
    assert (machine.orders == 0).all()
    assert machine.cooled == [100]


def test_where_nothing_works_it_says_so() -> None:
    holes = np.ones(512, np.bool_)
    machine = Machine(error=1, cold=False)
    assert not machine.divider().to_base_pages(machine.folio, Part(0, 9), holes)
    assert (machine.orders == 9).all()


def test_a_folio_is_told_from_its_parts_and_from_what_is_larger() -> None:
    machine = Machine()
    divider = machine.divider()
    assert divider.folio_at(START, 9) == machine.folio
    assert divider.folio_at(START, 8) is None
    machine.orders[:] = 8
    assert divider.folio_at(START, 9) is None
    assert divider.folio_at(START, 8) == LargeFolio(START, PFN, 8)
    machine.mapped[0] = False
    assert divider.folio_at(START, 8) is None
