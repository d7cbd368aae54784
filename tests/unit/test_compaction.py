"""Compaction of a zone, against a page-by-page account of the kernel's scanners."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from mthp.compaction import NO_STEP, ZonePages, compact
from mthp.freememory import FREE, MOVES, STAYS, TAIL


def zone(seed: int) -> tuple[ZonePages, int, NDArray[np.bool_]]:
    """Return pages of a random zone, the order of its blocks, and which of them are closed."""
    chance = random.Random(seed)
    order = chance.choice([3, 4, 6, 7])
    blocks = chance.randint(2, 24 if order < 6 else 9)
    count = blocks << order
    kind, folio, zero = np.zeros(count, np.int8), np.zeros(count, np.int8), np.zeros(count, np.bool_)
    free, stays, large = chance.random() * 0.6, chance.choice([0, 0.02, 0.3]), chance.choice([0, 0.1, 0.5, 0.9])
    zeroes, whole, at = chance.choice([0, 0.3, 0.9]), chance.choice([0, 0.15, 0.4]), 0
    while at < count:
        most = min((at & -at).bit_length() - 1 if at else order, order - (chance.random() < 0.7))
        of = chance.randint(0, most) if chance.random() < large else 0
        if at % (1 << order) == 0 and chance.random() < 2 * whole:
            full = chance.random() < 0.5
            kind[at : at + (1 << order)] = MOVES if full else FREE
            at += 1 << order
            continue
        size = 1 << of
        is_free = chance.random() < free
        kind[at : at + size] = FREE if is_free else STAYS if chance.random() < stays or of == order else MOVES
        if of and not is_free:
            folio[at], folio[at + 1 : at + size] = of, TAIL
            zero[at : at + size] = [kind[at] == MOVES and chance.random() < zeroes for _ in range(size)]
        at += size
    step = np.where(kind == FREE, NO_STEP, np.arange(count)).astype(np.int32)
    closed = np.array([chance.random() < 0.15 for _ in range(blocks)])
    return ZonePages(kind, folio, zero, step), order, closed


def copied(pages: ZonePages) -> ZonePages:
    return ZonePages(pages.kind.copy(), pages.folio.copy(), pages.zero.copy(), pages.step.copy())


class PageByPage:
    """What the scanners do, a page at a time, with the names that the kernel has for it."""

    def __init__(self, pages: ZonePages, order: int, closed: NDArray[np.bool_]) -> None:
        self.pages, self.size, self.order, self.closed = pages, 1 << order, order, closed
        self.buddies: dict[int, int] = {}
        at = 0
        while at < len(pages.kind):
            if pages.kind[at] != FREE:
                at += 1
                continue
            of = 0
            while of < order and at % (2 << of) == 0 and (pages.kind[at : at + (2 << of)] == FREE).all():
                of += 1
            self.buddies[at] = of
            at += 1 << of
        self.lists: list[list[int]] = [[] for _ in range(order + 1)]
        self.found = self.wanted = self.low = 0
        self.high = len(pages.kind) - self.size
        self.split: list[int] = []

    def isolate_in(self, at: int, end: int, stride: int) -> tuple[int, int]:
        total = 0
        while at < end:
            folio = int(self.pages.folio[at])
            if folio > 0 and at + (1 << folio) <= end:
                at += (1 << folio) - 1
            elif at in self.buddies:
                of = self.buddies.pop(at)
                self.lists[of].append(at)
                self.found, total = self.found + (1 << of), total + (1 << of)
                if self.found >= self.wanted:
                    return at + (1 << of), total
                at += (1 << of) - 1
            at += stride
        return end, total

    def isolate(self) -> None:
        at, start, stride = self.high, self.high // self.size * self.size, 1
        lowest = (self.low // self.size + 1) * self.size
        while start >= lowest:
            block, end = start // self.size, start + self.size
            if not self.closed[block] and self.buddies.get(start) != self.order:
                at, total = self.isolate_in(at, end, stride)
                if self.found >= self.wanted:
                    at = at if at < end else start - self.size
                    break
                stride = 1 if total else min(32, 2 * stride)
            start -= self.size
            at = start
        self.high = at

    def take(self, order: int) -> int | None:
        for again in (True, False):
            for of in range(order, self.order + 1):
                if self.lists[of]:
                    head = self.lists[of].pop(0)
                    for smaller in range(of - 1, order - 1, -1):
                        self.lists[smaller].insert(0, head + (1 << smaller))
                    self.found, self.wanted = self.found - (1 << order), self.wanted - (1 << order)
                    return head
            if again:
                self.isolate()
        return None

    def move(self, source: int, order: int, target: int) -> None:
        pages = np.arange(1 << order)
        self.pages.move(source + pages, target + pages)

    def run(self) -> None:
        last = None
        while self.high // self.size > self.low // self.size:
            block = self.low // self.size
            heads: list[tuple[int, int]] = []
            whole, at, self.wanted = last == block, self.low, 0
            while at < (block + 1) * self.size and (whole or self.wanted < 32):
                of = max(0, int(self.pages.folio[at]))
                if self.pages.kind[at] == MOVES and self.pages.folio[at] != TAIL:
                    heads.insert(0, (at, of))
                    self.wanted += 1 << of
                    at += 1 << of
                else:
                    at += 1
            self.low, last = at, block if heads else last
            rest: list[int] = []
            for head, of in heads:
                target = self.take(of)
                if target is not None:
                    self.move(head, of, target)
                elif of:
                    self.split.append(head)
                    rest += self.pages.split(head, of).tolist()
                else:
                    break
            else:
                for page in rest:
                    target = self.take(0)
                    if target is None:
                        break
                    self.move(page, 0, target)
                continue
            # The scanners met.
            return


@pytest.mark.parametrize("seed", range(150))
def test_pages_move_where_the_scanners_of_the_kernel_move_them(seed: int) -> None:
    pages, order, closed = zone(seed)
    expected = copied(pages)
    kernel = PageByPage(expected, order, closed)
    kernel.run()
    assert compact(pages, order, closed) == kernel.split
    for column in ("step", "kind", "folio", "zero"):
        assert getattr(pages, column).tolist() == getattr(expected, column).tolist(), column
