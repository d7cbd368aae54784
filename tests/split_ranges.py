"""PMD ranges of puppets with random contents and random target layouts, and readings of them.

`SPLITS` marks tests that split folios: where debugfs is closed, as under kernel lockdown, they are skipped, and the
guests of the lab run them.
"""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mthp.linux.live import LiveAddressSpace
from mthp.linux.split.file import split_ability
from mthp.linux.sysfs import ThpSysfs
from mthp.means import Means
from mthp.ptes import Block, Pte
from mthp.results import BlockOutcome, ScanResult
from targets import PAGE_SIZE, PMD_ORDER, PMD_SIZE, Puppet

SPLIT = Means("split")
PAGES = PMD_SIZE // PAGE_SIZE
ABILITY = split_ability(ThpSysfs().geometry()) if ThpSysfs().exists else None
SPLITS = [
    pytest.mark.live,
    pytest.mark.requires("root", "thp"),
    pytest.mark.skipif(
        ABILITY is None or not ABILITY.splits,
        reason="no THP" if ABILITY is None else ": ".join(ABILITY.why_no_split()),
    ),
]


class Target:
    """A PMD range of a puppet with random contents, and its target layout."""

    def __init__(self, puppet: Puppet, address: int, rng: random.Random, blocks: list[Block] | None = None) -> None:
        self.puppet, self.address = puppet, address
        self.present = np.zeros(PAGES, np.bool_)
        # Stretches that are used and stretches that are not, as real heaps have them.
        for _ in range(rng.randint(1, 12)):
            at, length = rng.randrange(PAGES), rng.choice((1, 3, 16, 40, 200))
            self.present[at : at + length] = True
        self.blocks = random_blocks(address, rng, self.present) if blocks is None else blocks
        # Pages differ and have a byte that is not 0. More random bytes would take an emulated processor too long.
        row = np.frombuffer(rng.randbytes(PAGE_SIZE), np.uint64)
        words = row + np.arange(PAGES, dtype=np.uint64)[:, None] * np.uint64(0x9E3779B97F4A7C15)
        words[~self.present] = 0
        self.bytes = words.view(np.uint8)
        self.write()

    def write(self) -> None:
        """Write the bytes of the present pages."""
        ends = np.flatnonzero(np.diff(self.present, prepend=False, append=False))
        with memory_of(self.puppet.pid, "r+b") as memory:
            for first, end in ends.reshape(-1, 2).tolist():
                os.pwrite(memory, self.bytes[first:end].tobytes(), self.address + first * PAGE_SIZE)

    @property
    def planned(self) -> NDArray[np.int8]:
        orders = np.where(self.present, 0, -1).astype(np.int8)
        for address, order in self.blocks:
            first = (address - self.address) // PAGE_SIZE
            orders[first : first + (1 << order)] = order
        return orders

    def orders(self, space: LiveAddressSpace) -> NDArray[np.int8]:
        """The order of the folio of each page; -1 for a hole, and for the zero page, which is one to the process."""
        columns = space.read([(self.address, self.address + PMD_SIZE)])
        there = columns.has(Pte.PRESENT) & ~columns.has(Pte.ZERO)
        return np.where(there, columns.folio_order, -1).astype(np.int8)

    def contents(self) -> NDArray[np.uint8]:
        with memory_of(self.puppet.pid) as memory:
            data = os.pread(memory, PMD_SIZE, self.address)
        return np.frombuffer(data, np.uint8).reshape(PAGES, PAGE_SIZE)

    def check(self, space: LiveAddressSpace, outcomes: list[BlockOutcome]) -> None:
        """All blocks have the planned order, all bytes are right, and nothing is resident that was not planned."""
        for (address, order), outcome in zip(self.blocks, outcomes, strict=True):
            assert (outcome.result, outcome.reason) == (ScanResult.SUCCEED, ""), outcome
            first = (address - self.address) // PAGE_SIZE
            assert outcome.filled == (1 << order) - int(self.present[first : first + (1 << order)].sum())
            assert not outcome.left_filled
        found, planned = runs_of(self.orders(space)), runs_of(self.planned)
        assert found == planned, f"{found} instead of {planned}"
        assert resident_of(self.puppet.pid, self.address) == int((self.planned >= 0).sum()) * PAGE_SIZE
        assert (self.contents() == self.bytes).all()


class memory_of:  # noqa: N801 - reads as a statement
    def __init__(self, pid: int, mode: str = "rb") -> None:
        self._file = Path(f"/proc/{pid}/mem").open(mode, buffering=0)  # noqa: SIM115

    def __enter__(self) -> int:
        return self._file.fileno()

    def __exit__(self, *_: object) -> None:
        self._file.close()


def random_blocks(address: int, rng: random.Random, present: NDArray[np.bool_]) -> list[Block]:
    """Random aligned blocks, each with something in it."""
    blocks: list[Block] = []

    def place(first: int, order: int) -> None:
        if not present[first : first + (1 << order)].any() or order < 2:
            return
        if order < PMD_ORDER and rng.random() < 0.3:
            blocks.append((address + first * PAGE_SIZE, order))
        elif rng.random() < 0.9:
            place(first, order - 1)
            place(first + (1 << order - 1), order - 1)

    while not blocks:
        place(0, PMD_ORDER)
    rng.shuffle(blocks)
    return blocks


def runs_of(orders: NDArray[Any]) -> list[tuple[int, int]]:
    """What `orders` are, and for how many pages each; so a difference can be read."""
    return [(order, len(list(run))) for order, run in itertools.groupby(orders.tolist())]


def resident_of(pid: int, address: int) -> int:
    """Rss of the mapping at `address` as smaps has it, in bytes."""
    text = Path(f"/proc/{pid}/smaps").read_text()
    at = text.index(f"{address:x}-")
    return int(text[at:].partition("\nRss:")[2].split()[0]) << 10
