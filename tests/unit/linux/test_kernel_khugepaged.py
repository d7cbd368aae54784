"""Driving the kernel's khugepaged: the values written, what counts as made, and that all is put back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mthp.errors import UnsupportedError
from mthp.geometry import X86_64
from mthp.linux.kernel_khugepaged import LEFT, NOT_IN_TIME, NOT_KNOWN, KernelKhugepaged
from mthp.linux.sysfs import ThpSysfs
from mthp.ptes import PteColumns, Segment
from mthp.results import ScanResult
from mthp.vma import Vma

START = 2 << 20
BLOCKS = [(START, 4), (START + (64 << 10), 4), (START + (2 << 20), 9)]


class Space:
    """An address space, a khugepaged of the test that makes its folios, and the THP directory that it reads."""

    geometry = X86_64

    def __init__(self, root: Path, *, since_7_2: bool = True) -> None:
        self.sysfs = ThpSysfs(root)
        self.flags = frozenset({"hg"})
        self.made: set[tuple[int, int]] = set()
        for order in (2, 4, 9):
            stats = root / f"hugepages-{4 << order}kB" / "stats"
            stats.mkdir(parents=True)
            (stats.parent / "enabled").write_text("always [inherit] madvise never\n")
            (stats / ("collapse_alloc" if since_7_2 else "nr_anon")).write_text("7\n")
        (root / "khugepaged").mkdir()
        self.set("full_scans", 100)

    def set(self, name: str, number: int) -> None:
        (self.sysfs.root / "khugepaged" / name).write_text(f"{number}\n")

    def make(self, *blocks: tuple[int, int]) -> None:
        """khugepaged makes folios, and counts them."""
        self.made |= set(blocks)
        for order in (2, 4, 9):
            count = 7 + sum(made == order for _, made in self.made)
            file = self.sysfs.root / f"hugepages-{4 << order}kB/stats/collapse_alloc"
            file.write_text(f"{count}\n")

    def vmas(self) -> list[Vma]:
        return [Vma(START, START + (4 << 20), "rw-p", flags=self.flags)]

    def read(self, segments: list[Segment]) -> PteColumns:
        orders = []
        for start, end in segments:
            pages = np.zeros((end - start) >> 12, np.int8)
            for address, order in self.made:
                first = (address - start) >> 12
                pages[max(0, first) : max(0, first + (1 << order))] = order
            orders.append(pages)
        joined = np.concatenate(orders)
        return PteColumns(tuple(segments), np.ones(len(joined), np.uint16), joined)


class Journal:
    """Records settings, and lets khugepaged work on the memory."""

    def __init__(self, *windows: Any) -> None:
        self.wanted: dict[str, str] = {}
        self.open = False
        self._work = windows

    @contextlib.contextmanager
    def settings(self, wanted: Mapping[str, str]) -> Iterator[None]:
        self.wanted, self.open = dict(wanted), True
        for work in self._work:
            work()
        try:
            yield
        finally:
            self.open = False


def _collapse(space: Space, journal: Journal, *, fill: bool = False) -> list[tuple[ScanResult, str]]:
    khugepaged = KernelKhugepaged(space, journal, seconds=0.1)  # type: ignore[arg-type]
    outcomes = khugepaged.collapse(BLOCKS, fill=fill)
    assert not journal.open
    return [(outcome.result, outcome.reason) for outcome in outcomes]


@pytest.fixture
def space(tmp_path: Path) -> Space:
    return Space(tmp_path)


def test_the_planned_sizes_are_on_and_no_other_and_khugepaged_is_woken_last(space: Space) -> None:
    journal = Journal()
    _collapse(space, journal)
    switches = {path: word for path, word in journal.wanted.items() if path.startswith("hugepages")}
    assert switches == {
        "hugepages-64kB/enabled": "madvise",
        "hugepages-2048kB/enabled": "madvise",
        "hugepages-16kB/enabled": "never",
    }
    assert journal.wanted["khugepaged/max_ptes_none"] == "0"
    assert list(journal.wanted)[-1] == "khugepaged/scan_sleep_millisecs"


def test_memory_without_advice_needs_sizes_that_are_always_on(space: Space) -> None:
    space.flags = frozenset()
    journal = Journal()
    _collapse(space, journal, fill=True)
    assert journal.wanted["hugepages-64kB/enabled"] == "always"
    assert journal.wanted["khugepaged/max_ptes_none"] == "511"


def test_what_the_page_tables_show_is_made(space: Space) -> None:
    journal = Journal(lambda: space.make(*BLOCKS))
    assert _collapse(space, journal) == [(ScanResult.SUCCEED, "")] * 3


def test_a_larger_folio_does_as_well(space: Space) -> None:
    journal = Journal(lambda: space.make((START, 5), BLOCKS[2]))
    assert _collapse(space, journal) == [(ScanResult.SUCCEED, "")] * 3


def test_why_the_rest_was_left(space: Space) -> None:
    assert _collapse(space, Journal()) == [(ScanResult.FAIL, NOT_IN_TIME)] * 3

    started = KernelKhugepaged._full_scans

    def scanned(self: KernelKhugepaged) -> int:
        seen.append(1)
        return started(self) + (len(seen) > 1) * 3

    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelKhugepaged, "_full_scans", scanned)
        assert _collapse(space, Journal()) == [(ScanResult.FAIL, NOT_KNOWN)] * 3
        seen.clear()
        results = _collapse(space, Journal(lambda: space.make(BLOCKS[0])))
    assert results == [(ScanResult.SUCCEED, ""), (ScanResult.FAIL, LEFT), (ScanResult.FAIL, LEFT)]


def test_a_kernel_without_it_is_told_apart_before_anything_is_set(tmp_path: Path) -> None:
    journal = Journal()
    with pytest.raises(UnsupportedError, match="64K"):
        _collapse(Space(tmp_path, since_7_2=False), journal)
    assert journal.wanted == {}
