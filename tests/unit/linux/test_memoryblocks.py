"""Blocks of memory, read from a file with the flags of frames."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mthp.freememory import FreeMemory, FreeZone
from mthp.linux import abi
from mthp.linux.memoryblocks import memory_blocks

PMD_ORDER = 3
FREE, USED, KERNEL = abi.KPF_BUDDY, abi.KPF_LRU | abi.KPF_ANON, 1 << 7
HEAD, TAIL = USED | abi.KPF_COMPOUND_HEAD, abi.KPF_ANON | abi.KPF_COMPOUND_TAIL
MEMORY = FreeMemory((FreeZone((), 0, frames=(0, 12)), FreeZone((), 0, frames=(12, 32))))
BLOCKS = [
    [FREE] * 4 + [USED] * 2 + [KERNEL, 0],
    [HEAD, *[TAIL] * 7],
    [HEAD, *[TAIL] * 3, FREE, FREE, 0, 0],
    [abi.KPF_THP | abi.KPF_COMPOUND_TAIL, abi.KPF_HUGE | HEAD, *[abi.KPF_NOPAGE] * 6],
]


def flags(path: Path) -> str:
    (path / "kpageflags").write_bytes(np.array(BLOCKS, np.uint64).tobytes())
    return str(path / "kpageflags")


def test_pages_are_free_move_stay_or_are_unknown(tmp_path: Path) -> None:
    blocks = memory_blocks(MEMORY, PMD_ORDER, PMD_ORDER, path=flags(tmp_path))
    assert blocks is not None
    assert blocks.free.tolist() == [4, 0, 2, 0]
    # A folio of the PMD order does not move, nor does one of hugetlbfs.
    assert blocks.movable.tolist() == [2, 0, 4, 1]
    assert blocks.unknown.tolist() == [1, 0, 2, 0]
    assert (blocks.numbers.tolist(), blocks.zone.tolist()) == ([0, 1, 2, 3], [0, 0, 1, 1])


def test_smaller_blocks_are_parts_of_those(tmp_path: Path) -> None:
    blocks = memory_blocks(MEMORY, 2, PMD_ORDER, path=flags(tmp_path))
    assert blocks is not None
    assert blocks.free.tolist() == [4, 0, 0, 0, 0, 2, 0, 0]
    assert blocks.zone.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]


def test_of_much_memory_a_sample_is_read(tmp_path: Path) -> None:
    blocks = memory_blocks(MEMORY, PMD_ORDER, PMD_ORDER, most=16, path=flags(tmp_path))
    assert blocks is not None
    assert (blocks.weight, blocks.numbers.tolist()) == (3, [0, 1])


def test_without_the_right_to_read_nothing_is_known(tmp_path: Path) -> None:
    assert memory_blocks(MEMORY, PMD_ORDER, PMD_ORDER, path=str(tmp_path / "nothing")) is None
