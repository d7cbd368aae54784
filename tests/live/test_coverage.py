"""Coverage of real processes: that of the whole process, as smaps has it, and of folios as the hardware uses them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.helpers import mthp_here, mthp_json_here
from mover_targets import READY, program
from targets import PAGE_SIZE, PMD_ORDER, PMD_SIZE

pytestmark = [pytest.mark.live, pytest.mark.requires("root", "thp")]

TARGET = """
import ctypes, mmap, time
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
PMD, PAGE = {pmd}, {page}

def mapped(size, protection=3, flags=0x22, at=None):
    address = libc.mmap(at, size, protection, flags, -1, 0)
    assert address != 2**64 - 1
    return address

def aligned(size):
    reserved = mapped(size + 2 * PMD, 0)
    start = -(-reserved // PMD) * PMD
    return mapped(size, 3, 0x32, start)
"""

MANY_SMALL = """
step = PMD // 2
reserved = mapped(200 * step, 0)
for index in range(200):
    start = mapped(step - 4 * PAGE, 3, 0x32, reserved + index * step)
    ctypes.memset(start, 1, step - 4 * PAGE)
heap = aligned(8 * PMD)
ctypes.memset(heap, 1, 8 * PMD)
"""

MOVED = """
heap = aligned(4 * PMD)
ctypes.memset(heap, 1, 4 * PMD)
assert libc.madvise(heap, 4 * PMD, 25) == 0
hole = mapped(8 * PMD, 0)
to = -(-hole // PMD) * PMD + 16 * PAGE
assert libc.mremap(heap, 4 * PMD, 4 * PMD, 3, to) == to
"""


@pytest.fixture
def start(request: pytest.FixtureRequest) -> Iterator[int]:
    """Start a process that makes the layout of the parameter, and return its PID."""
    code = TARGET.format(pmd=PMD_SIZE, page=PAGE_SIZE) + request.param + READY
    with program(code) as (pid, _):
        yield pid


def rollup(pid: int) -> dict[str, int]:
    """What smaps_rollup says, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}


@pytest.mark.parametrize("start", [MANY_SMALL], indirect=True)
def test_memory_in_mappings_smaller_than_the_pmd_size_counts(start: int) -> None:
    done = mthp_json_here("collapse", start, "--orders", f"order={PMD_ORDER}", "--min-coverage", "95%", code=1)
    smaps = rollup(start)
    assert smaps["AnonHugePages"] >= 8 * PMD_SIZE
    assert done["coverage"] == pytest.approx(smaps["AnonHugePages"] / smaps["Anonymous"], abs=0.002)
    assert done["measured"]["resident_bytes"] == pytest.approx(smaps["Anonymous"], rel=0.01)
    assert (done["complete"], done["min_coverage_reached"]) == (True, False)
    left = {each["reason"]: each["resident_bytes"] for each in done["plan"]["left_alone"]}
    assert sum(left.values()) == pytest.approx(smaps["Anonymous"] - smaps["AnonHugePages"], rel=0.05)
    assert "that --min-coverage requires" in mthp_here("collapse", start, "--min-coverage", "95%").stdout


@pytest.mark.parametrize("start", [MANY_SMALL, MOVED], indirect=True)
def test_pagemap_says_what_smaps_says(start: int) -> None:
    census, smaps = mthp_json_here("inspect", start), rollup(start)
    assert census["anonymous"]["resident_bytes"] == smaps["Anonymous"]
    huge = census["anonymous"]["huge_coverage"] * census["anonymous"]["resident_bytes"]
    assert huge == pytest.approx(smaps["AnonHugePages"])


@pytest.mark.requires("pfns")
@pytest.mark.parametrize("start", [MOVED], indirect=True)
def test_a_folio_off_its_alignment_is_no_huge_mapping(start: int) -> None:
    census = mthp_json_here("inspect", start)
    by_alignment = census["anonymous"]["pages_by_alignment"][str(PMD_ORDER)]
    assert by_alignment["unaligned"] * PAGE_SIZE == 4 * PMD_SIZE
    assert by_alignment["aligned"] == by_alignment["pmd_mapped"] == 0
    assert census["anonymous"]["huge_coverage"] == 0.0
    # Addresses and frames are alike up to 64K, so smaller blocks can be used.
    plan = mthp_json_here("plan", start, "--orders", "64K")
    assert plan["measured"]["share_by_order"]["4"] > 0.4
    assert plan["measured"]["share_by_order"]["5"] < 0.05
    assert "unaligned" in mthp_here("inspect", start).stdout
    # The kernel's call makes huge mappings of what lies in whole PMD ranges.
    after = mthp_json_here("collapse", start, "--orders", f"order={PMD_ORDER}")
    assert after["coverage"] == pytest.approx(rollup(start)["AnonHugePages"] / rollup(start)["Anonymous"], abs=0.002)
    assert after["coverage"] > 0
