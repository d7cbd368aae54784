"""Blocks of memory, read from a file with the flags of frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mthp.freememory import FREE, MOVES, STAYS, TAIL, UNKNOWN, FreeMemory, FreeZone
from mthp.linux import abi
from mthp.linux.memoryblocks import memory_blocks

PMD_ORDER = 3
BUDDY, USED, KERNEL = abi.KPF_BUDDY, abi.KPF_LRU | abi.KPF_ANON, 1 << 7
HEAD, REST = USED | abi.KPF_COMPOUND_HEAD, abi.KPF_ANON | abi.KPF_COMPOUND_TAIL
MEMORY = FreeMemory((FreeZone((), 0, frames=(0, 12)), FreeZone((), 0, frames=(12, 32))))
BLOCKS = [
    [BUDDY] * 4 + [USED] * 2 + [KERNEL, 0],
    [HEAD, *[REST] * 7],
    [HEAD, *[REST] * 3, BUDDY, BUDDY, 0, 0],
    [abi.KPF_THP | abi.KPF_COMPOUND_TAIL, abi.KPF_HUGE | HEAD, *[abi.KPF_NOPAGE] * 6],
]


def flags(path: Path) -> str:
    (path / "kpageflags").write_bytes(np.array(BLOCKS, np.uint64).tobytes())
    return str(path / "kpageflags")


def test_pages_are_free_move_stay_or_are_unknown(tmp_path: Path) -> None:
    blocks = memory_blocks(MEMORY, PMD_ORDER, path=flags(tmp_path))
    assert blocks is not None
    assert blocks.pages[0].tolist() == [FREE] * 4 + [MOVES] * 2 + [STAYS, UNKNOWN]
    # A folio of the PMD order does not move, nor does one of hugetlbfs.
    assert [blocks.count(kind).tolist() for kind in (FREE, MOVES, UNKNOWN)] == [
        [4, 0, 2, 0],
        [2, 0, 4, 1],
        [1, 0, 2, 0],
    ]
    assert (blocks.numbers.tolist(), blocks.zone.tolist()) == ([0, 1, 2, 3], [0, 0, 1, 1])
    assert blocks.free_in(np.array([0, 1, 5, 9]), 2).tolist() == [4, 0, 2, 0]
    assert blocks.folios.tolist() == [
        [0] * 8,
        [3, *[TAIL] * 7],
        [2, *[TAIL] * 3, 0, 0, 0, 0],
        [0] * 8,
    ]


@pytest.mark.parametrize(
    ("release", "kind"), [("6.1.0-40-amd64", STAYS), ("6.8.12", STAYS), ("6.9.1", MOVES), ("7.3", MOVES), ("?", MOVES)]
)
def test_large_folios_move_in_linux_6_9_and_later(tmp_path: Path, release: str, kind: int) -> None:
    blocks = memory_blocks(MEMORY, PMD_ORDER, path=flags(tmp_path), release=release)
    assert blocks is not None
    assert blocks.pages[2].tolist() == [kind] * 4 + [FREE] * 2 + [UNKNOWN] * 2


@pytest.mark.parametrize("flag", [abi.KPF_SLAB, abi.KPF_PGTABLE, abi.KPF_HUGE])
def test_pages_of_the_kernel_stay_although_they_look_like_those_of_programs(tmp_path: Path, flag: int) -> None:
    path = Path(flags(tmp_path))
    words = np.fromfile(path, np.uint64)
    words[:2] = [USED | flag, USED]
    path.write_bytes(words.tobytes())
    blocks = memory_blocks(MEMORY, PMD_ORDER, path=str(path))
    assert blocks is not None
    assert blocks.pages[0, :2].tolist() == [STAYS, MOVES]


def test_of_much_memory_a_sample_is_read(tmp_path: Path) -> None:
    blocks = memory_blocks(MEMORY, PMD_ORDER, most=16, path=flags(tmp_path))
    assert blocks is not None
    assert (blocks.weight, blocks.numbers.tolist()) == (3, [0, 1])


def test_without_the_right_to_read_nothing_is_known(tmp_path: Path) -> None:
    assert memory_blocks(MEMORY, PMD_ORDER, path=str(tmp_path / "nothing")) is None


PAGE_TYPES = """\
Free pages count per migrate type at order      0      1      2      3
Node    0, zone      DMA, type    Unmovable      0      0{0:7d}      0
Node    0, zone      DMA, type      Movable      0      9      9      9
Node    0, zone   Normal, type      Movable      0      0      0      0
Node    0, zone   Normal, type  Reclaimable      0{1:7d}      0 >100000
Node    0, zone   Normal, type          CMA      0      9      0      0

Number of blocks type     Unmovable      Movable  Reclaimable   HighAtomic      Isolate
Node 0, zone      DMA            1            7            0            0            0
"""


@pytest.mark.parametrize(
    ("unmovable", "reclaimable", "closed"),
    [(0, 0, []), (1, 0, [0]), (0, 1, [2]), (2, 2, [0, 2])],
)
def test_compaction_moves_nothing_to_blocks_whose_free_pages_are_of_another_type(
    tmp_path: Path, unmovable: int, reclaimable: int, closed: list[int]
) -> None:
    (tmp_path / "pagetypeinfo").write_text(PAGE_TYPES.format(unmovable, reclaimable))
    blocks = memory_blocks(MEMORY, PMD_ORDER, path=flags(tmp_path))
    assert blocks is not None
    assert np.flatnonzero(blocks.closed).tolist() == closed


@pytest.mark.parametrize(
    ("first", "second", "types", "closed"),
    [
        # Both have one free block of two pages.
        ([BUDDY] * 2 + [KERNEL] * 6, [BUDDY] * 2 + [USED] * 5 + [KERNEL], {"Unmovable": "0 1 0 0"}, [0]),
        ([BUDDY] * 2 + [USED] * 5 + [KERNEL], [BUDDY] * 2 + [KERNEL] * 6, {"Unmovable": "0 1 0 0"}, [1]),
        # The second explains all free blocks of its type.
        ([BUDDY] * 2 + [KERNEL] * 6, [BUDDY, KERNEL] * 2 + [BUDDY] * 2 + [KERNEL] * 2, {"Unmovable": "2 1 0 0"}, [1]),
        # No type has both, but they have them together.
        (
            [BUDDY, KERNEL] * 2 + [BUDDY] * 2 + [KERNEL] * 2,
            [USED] * 8,
            {"Unmovable": "2 0 0 0", "Reclaimable": "0 1 0 0"},
            [],
        ),
        # Blocks of programs and free pages alone are open.
        ([BUDDY] * 2 + [USED] * 6, [KERNEL] * 8, {"Unmovable": "0 1 0 0"}, []),
        # Of two types, the first block takes the one that it explains best; the other explains the second.
        (
            [BUDDY, KERNEL] * 2 + [KERNEL] * 4,
            [BUDDY, KERNEL] + [BUDDY] * 2 + [KERNEL] * 4,
            {"Unmovable": "2 1 0 0", "Reclaimable": "2 0 0 0"},
            [0, 1],
        ),
    ],
)
def test_closed_blocks_are_those_that_explain_the_free_blocks_of_a_type(
    tmp_path: Path, first: list[int], second: list[int], types: dict[str, str], closed: list[int]
) -> None:
    path = Path(flags(tmp_path))
    path.write_bytes(np.array([*first, *second, *[KERNEL] * 16], np.uint64).tobytes())
    lines = [f"Node    0, zone   Normal, type {kind:>12} {counts}" for kind, counts in types.items()]
    (tmp_path / "pagetypeinfo").write_text("\n".join(lines) + "\n")
    blocks = memory_blocks(FreeMemory((FreeZone((), 0, frames=(0, 32)),)), PMD_ORDER, path=str(path))
    assert blocks is not None
    assert np.flatnonzero(blocks.closed).tolist() == closed


def test_each_zone_has_its_own_free_blocks_and_a_sample_its_share(tmp_path: Path) -> None:
    path = Path(flags(tmp_path))
    path.write_bytes(np.array([*[BUDDY] * 2, *[KERNEL] * 6] * 4, np.uint64).tobytes())
    text = "Node    0, zone  DMA, type Unmovable 0 0 0 0\nNode    0, zone  Normal, type Unmovable 0 {} 0 0\n"
    zones = FreeMemory((FreeZone((), 0, frames=(0, 8)), FreeZone((), 0, frames=(8, 32))))
    for count, most, closed in ((1, 32, [1]), (1, 16, []), (2, 16, [1])):
        (tmp_path / "pagetypeinfo").write_text(text.format(count))
        blocks = memory_blocks(zones, PMD_ORDER, most=most, path=str(path))
        assert blocks is not None
        assert (np.flatnonzero(blocks.closed).tolist(), blocks.weight) == (closed, 1 if most == 32 else 2)


def test_without_types_blocks_without_pages_that_move_are_taken_for_such(tmp_path: Path) -> None:
    path = Path(flags(tmp_path))
    words = np.fromfile(path, np.uint64)
    words[:8] = [BUDDY] * 7 + [KERNEL]
    path.write_bytes(words.tobytes())
    blocks = memory_blocks(MEMORY, PMD_ORDER, path=str(path))
    assert blocks is not None
    assert np.flatnonzero(blocks.closed).tolist() == [0]
