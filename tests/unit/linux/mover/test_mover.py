"""Bytes that were not moved right end all moving in that process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mthp.linux.mover import mover as module
from mthp.linux.mover.mover import Mover
from mthp.linux.mover.recheck import Before
from mthp.means import Means
from mthp.ptes import Block, PteColumns
from mthp.results import BlockOutcome, ScanResult

BASE = 1 << 40
LARGE, SMALL = (BASE, 6), (BASE + (1 << 20), 4)
MEANS = Means("move", verify=True)
UNREAD = cast("PteColumns", None)


class Unchecked(Mover):
    """A mover that looks at no memory of its target."""

    def _check(self, *_: object) -> None:  # type: ignore[override]
        return None


class WrongBytes:
    """A hold that moves every block, and spoils those of order 6."""

    waived: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.moved: list[Block] = []

    def admit(self, means: Means, refusals: Sequence[object]) -> None:
        assert not refusals

    def too_large(self, order: int) -> range:
        return range(0)

    def ready(self, order: int) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def windows(self, blocks: Sequence[Block], means: Means, before: Before) -> Iterator[list[BlockOutcome]]:
        self.moved += blocks
        yield [
            BlockOutcome(*block, ScanResult.SUCCEED if block[1] < 6 else ScanResult.FAIL, verified=block[1] < 6)
            for block in blocks
        ]


@pytest.fixture
def hold(monkeypatch: pytest.MonkeyPatch) -> WrongBytes:
    monkeypatch.setattr(module, "refuse_process", lambda *_: [])
    monkeypatch.setattr(module, "last_pid", lambda: 1)
    return WrongBytes()


def mover_of(hold: WrongBytes) -> Mover:
    target: Any = SimpleNamespace(process=None, geometry=None)
    journal: Any = SimpleNamespace(only=lambda order, off: contextlib.nullcontext())
    return Unchecked(target, cast("Any", hold), journal)


def test_after_wrong_bytes_nothing_more_is_moved(hold: WrongBytes) -> None:
    mover = mover_of(hold)
    large, small = mover.collapse([LARGE, SMALL], MEANS, UNREAD)
    assert hold.moved == [LARGE]
    assert (large.result, large.verified) == (ScanResult.FAIL, False)
    assert (small.result, small.everywhere) == (ScanResult.FAIL, True)
    (again,) = mover.collapse([SMALL], MEANS, UNREAD)
    assert (hold.moved, again.everywhere, again.reason) == ([LARGE], True, small.reason)


def test_blocks_whose_bytes_are_right_go_on(hold: WrongBytes) -> None:
    mover = mover_of(hold)
    for _ in range(2):
        (outcome,) = mover.collapse([SMALL], MEANS, UNREAD)
        assert outcome.result is ScanResult.SUCCEED
    assert hold.moved == [SMALL, SMALL]
