"""The library below the PMD size: own memory collapsed while threads use it, with and without rights."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import mthp
from mover_targets import pages_by_order
from mthp.errors import UnsupportedError, UsageError
from mthp.results import ScanResult
from targets import PAGE_SIZE, map_aligned
from thp_switches import ThpSwitches, words_per_size
from waiting import PATIENCE

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "mthp", "pfns", "4k-pages")]

SIZE = 8 << 20
K64 = 64 << 10


@pytest.fixture
def memory(no_sizes: None) -> Iterator[NDArray[np.uint64]]:
    """Memory of small pages, filled with a pattern."""
    address = map_aligned(SIZE, 0)
    array = np.frombuffer(memoryview((ctypes.c_char * SIZE).from_address(address)).cast("B"), np.uint64)
    array[:] = np.arange(SIZE // 8, dtype=np.uint64)
    yield array
    ctypes.CDLL(None).munmap(ctypes.c_void_p(address), ctypes.c_size_t(SIZE))


def address_of(array: NDArray[np.uint64]) -> int:
    return int(array.ctypes.data)


def orders(array: NDArray[np.uint64]) -> Counter[int]:
    return pages_by_order("self", address_of(array), array.nbytes)


@pytest.mark.parametrize("order", [2, 4, 8, 9])
def test_a_buffer_becomes_folios_of_an_order(memory: NDArray[np.uint64], order: int) -> None:
    words = words_per_size()
    report = mthp.collapse_buffer(memory, order=order)
    assert report.complete
    made = report.ranges.made if order == 9 else report.folios[order].made
    assert made == SIZE // (PAGE_SIZE << order)
    assert report.copied_bytes == SIZE
    assert orders(memory) == {order: SIZE // PAGE_SIZE}
    assert (memory == np.arange(SIZE // 8, dtype=np.uint64)).all()
    assert words_per_size() == words
    again = mthp.collapse_buffer(memory, order=order)
    assert again.complete
    assert again.copied_bytes == 0


def test_a_buffer_smaller_than_a_pmd_range(memory: NDArray[np.uint64]) -> None:
    part = memory[K64 // 8 : 4 * K64 // 8]
    report = mthp.collapse_buffer(part, 4)
    assert report.folios[4].made == 3
    assert orders(part) == {4: 48}
    assert orders(memory)[4] == 48
    nothing = mthp.collapse_buffer(memory[1 : K64 // 8], 4)
    assert (nothing.done_nothing, nothing.complete, nothing.folios) == (True, False, {})


def test_holes_are_filled_when_that_is_wanted(memory: NDArray[np.uint64]) -> None:
    ctypes.CDLL(None).madvise(ctypes.c_void_p(address_of(memory) + PAGE_SIZE), ctypes.c_size_t(PAGE_SIZE), 4)
    without = mthp.collapse_buffer(memory, 4)
    assert without.folios[4].failed_by_result == {ScanResult.EXCEED_NONE_PTE: 1}
    assert not without.complete
    report = mthp.collapse_buffer(memory, 4, fill=True)
    assert (report.folios[4].made, report.filled_bytes) == (1, PAGE_SIZE)
    assert report.complete
    assert orders(memory) == {4: SIZE // PAGE_SIZE}
    assert not memory[PAGE_SIZE // 8 : 2 * PAGE_SIZE // 8].any()


def test_wrong_usage(memory: NDArray[np.uint64]) -> None:
    for order in (0, 1, 10):
        with pytest.raises(UsageError, match="order"):
            mthp.collapse_buffer(memory, order)
    with pytest.raises(UsageError, match="policy"):
        mthp.collapse_buffer(memory, 4, policy="rfc")
    with pytest.raises(UnsupportedError, match="verified"):
        mthp.collapse_buffer(memory, 4, verify=True)
    assert orders(memory) == {0: SIZE // PAGE_SIZE}


NOBODY = """
import os, sys
sys.path.insert(0, {tests!r})
import mthp, mthp.api, mthp.linux.mover.guarded, numpy as np, ctypes, contextlib
from early_imports import import_all
from targets import map_aligned
import_all()
address = map_aligned(1 << 20, 0)
array = np.frombuffer(memoryview((ctypes.c_char * (1 << 20)).from_address(address)).cast("B"), np.uint64)
array[:] = 7
with contextlib.suppress(mthp.MthpError):
    mthp.collapse_buffer(array, 2, dry_run=True)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
try:
    report = mthp.collapse_buffer(array, 4, guarded=False)
    print("made", report.folios[4].made, int((array == 7).all()))
except mthp.MthpError as error:
    print(type(error).__name__, error, error.help)
"""


def in_python(code: str) -> str:
    code = code.format(tests=str(Path(__file__).parents[1]))
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_without_rights_it_takes_a_size_that_is_on(no_sizes: None, thp_switches: ThpSwitches) -> None:
    said = in_python(NOBODY)
    assert said.startswith("NotPermittedError")
    assert "hugepages-64kB/enabled" in said
    thp_switches.only("64kB", word="always")
    assert in_python(NOBODY) == "made 16 1"
