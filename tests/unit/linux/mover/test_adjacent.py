"""Adjoining blocks are moved together, and each keeps its own outcome."""

from __future__ import annotations

import errno

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mthp.linux.mover import stub
from mthp.linux.mover.adjacent import operations_of, outcomes_of, run_lengths
from mthp.linux.mover.outcome import Objection
from mthp.results import ScanResult

REACH = 2 << 20
BLOCK = 65536
PAGES = 16
AWAY = Objection(ScanResult.PTE_NON_PRESENT, "gone")


def columns(*numbers: int) -> tuple[np.ndarray, np.ndarray]:
    """Addresses and sizes of blocks of 64 KiB."""
    addresses = np.array(numbers, np.int64) * BLOCK
    return addresses, np.full(len(numbers), BLOCK, np.int64)


def test_neighbours_within_the_range_of_a_page_table_make_a_run() -> None:
    assert run_lengths(*columns(0, 1, 2, 5, 6, 9), REACH).tolist() == [3, 2, 1]
    assert run_lengths(*columns(30, 31, 32, 33), REACH).tolist() == [2, 2]
    assert run_lengths(*columns(3, 2, 1), REACH).tolist() == [1, 1, 1]
    assert run_lengths(*columns(), REACH).tolist() == []


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 63)), unique=True, max_size=60).map(sorted))
def test_a_run_is_one_range_of_blocks_of_one_size(blocks: list[tuple[int, int]]) -> None:
    sizes = np.array([4096 << order for order, _ in blocks], np.int64)
    addresses = np.array([at for _, at in blocks], np.int64) * sizes
    lengths = run_lengths(addresses, sizes, REACH)
    assert lengths.sum() == len(blocks)
    operations = operations_of(addresses, sizes, lengths, 0)
    first = 0
    for length, operation in zip(lengths.tolist(), operations, strict=True):
        start, end = int(operation["address"]), int(operation["address"] + operation["length"])
        rows = slice(first, first + length)
        assert addresses[rows].tolist() == list(range(start, end, sizes[first]))
        assert (sizes[rows] == sizes[first]).all()
        assert start // REACH == (end - 1) // REACH
        assert operation["populated"] == (length > 1)
        first += length
        # Nothing that could have been joined was left apart.
        if first < len(blocks) and addresses[first] == end and sizes[first] == sizes[first - 1]:
            assert end % REACH == 0


def test_what_a_run_did_is_told_of_each_block() -> None:
    addresses, sizes = columns(0, 1, 2, 3, 8)
    lengths = run_lengths(addresses, sizes, REACH)
    operations = operations_of(addresses, sizes, lengths, 0)
    operations["error"], operations["moved"] = 0, operations["length"]
    operations["begun"]["seconds"], operations["ended"]["seconds"] = 1, (5, 3)
    blocks = [(address, 4) for address in addresses.tolist()]
    outcomes, left = outcomes_of(
        [*blocks[:2], (77, 4), *blocks[2:]], [None, None, AWAY, *[None] * 3], operations, lengths
    )
    assert left == []
    assert [outcome.address for outcome in outcomes] == [0, BLOCK, 77, 2 * BLOCK, 3 * BLOCK, 8 * BLOCK]
    assert [outcome.copied for outcome in outcomes] == [PAGES, PAGES, 0, PAGES, PAGES, PAGES]
    assert [outcome.elapsed_ns for outcome in outcomes] == [10**9, 10**9, 0, 10**9, 10**9, 2 * 10**9]
    assert (outcomes[2].result, outcomes[2].reason) == AWAY
    assert {outcome.verified for outcome in outcomes} == {None}


def test_of_a_run_that_failed_the_blocks_before_are_done_and_the_rest_goes_again() -> None:
    addresses, sizes = columns(0, 1, 2, 3)
    lengths = run_lengths(addresses, sizes, REACH)
    blocks = [(address, 4) for address in addresses.tolist()]
    assert operations_of(addresses, sizes, lengths, 0)["populated"].tolist() == [1]
    for moved, done in ((0, 0), (4096, 0), (2 * BLOCK, 2), (2 * BLOCK + 4096, 2), (4 * BLOCK - 4096, 3)):
        operations = operations_of(addresses, sizes, lengths, 0)
        operations["error"], operations["moved"] = -errno.EBUSY, moved
        outcomes, left = outcomes_of(blocks, [None] * 4, operations, lengths)
        assert [outcome.address for outcome in outcomes] == addresses[:done].tolist()
        assert {(outcome.result, outcome.errno, outcome.copied) for outcome in outcomes} <= {
            (ScanResult.SUCCEED, 0, PAGES)
        }
        assert left == blocks[done:]


def test_a_block_alone_has_its_own_error() -> None:
    addresses, sizes = columns(0, 1, 2)
    alone = np.ones(3, np.int64)
    operations = operations_of(addresses, sizes, alone, stub.FLAG_VERIFY)
    assert operations["populated"].tolist() == [0, 0, 0]
    operations["error"], operations["moved"] = (0, -errno.EAGAIN, -errno.EBUSY), (BLOCK, 4096, 0)
    operations["hash_before"], operations["hash_after"] = (1, 2, 3), (1, 3, 4)
    outcomes, left = outcomes_of([(address, 4) for address in addresses.tolist()], [None] * 3, operations, alone)
    assert left == []
    assert [outcome.errno for outcome in outcomes] == [0, errno.EAGAIN, errno.EBUSY]
    assert [outcome.verified for outcome in outcomes] == [True, False, None]
    assert [outcome.result for outcome in outcomes] == [
        ScanResult.SUCCEED,
        ScanResult.FAIL,
        ScanResult.PAGE_COUNT,
    ]
