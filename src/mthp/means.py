"""How blocks are collapsed, and what that may cost the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mthp.budget import DEFAULT_BLOAT, Amount, as_amount
from mthp.errors import UsageError

Mechanism = Literal["auto", "madvise", "split", "move", "madvise,move", "khugepaged"]
"""How pages are collapsed: by MADV_COLLAPSE, by that and splits of its folio, by the mover, by each where it fits the
order, or by the kernel's own khugepaged. ``auto`` is whatever the kernel does by itself: the mover injects code, so it
must be asked for by name."""

MAX_PAUSE_NS = 1_000_000
PAUSE_SHARE = 0.2
"""How long a target is stopped at a time by default, and for what part of the time: a busy server keeps most of its
throughput (bench/bench_redis.py)."""


@dataclass(frozen=True, slots=True)
class Means:
    """How to do it: by what means blocks are collapsed, and what that may cost the target.

    Attributes:
        mechanism: what collapses them; see :data:`Mechanism`.
        max_bloat: by how much resident memory may grow, in bytes or as a share of what is resident; None for no bound.
        max_copied: bytes that may be copied, or a share of what is resident; None for no bound.
        reserve: what must stay free below every memory limit of the target, in bytes or as a share of the limit; None
            for the default (:func:`mthp.budget.kept_free`).
        max_threads: refuse to move memory of a target with more threads; None for what `max_pause` allows
            (:func:`mthp.means.most_threads`).
        rate: bytes collapsed per second, or tried to be; None for as fast as it goes.
        max_pause: how long the target's threads may be stopped in one window of the mover, in seconds.
        pause_share: the part of the time that they may be stopped, above 0, up to 1.
        min_split_share: leave PMD ranges alone of whose contents splits would put less than this share into planned
            folios, because all of them are copied.
        fill: whether the mover may fill holes, as the kernel's call does; without, blocks with holes are left alone.
        verify: compare a hash of the bytes of every moved block before and after, inside the window.

    Raises:
        UsageError: a mechanism that does not exist, or a number out of range.
    """

    mechanism: Mechanism = "auto"
    max_bloat: Amount | int | None = DEFAULT_BLOAT
    max_copied: Amount | int | None = None
    reserve: Amount | int | None = None
    max_threads: int | None = None
    rate: int | None = None
    max_pause: float = MAX_PAUSE_NS * 1e-9
    pause_share: float = PAUSE_SHARE
    min_split_share: float = 0.0
    fill: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        if self.mechanism not in get_args(Mechanism):
            known = ", ".join(get_args(Mechanism))
            raise UsageError(f"unknown mechanism {self.mechanism!r}", help=f"use one of {known}")
        for value in (self.max_bloat, self.max_copied, self.reserve):
            as_amount(value)
        if self.max_threads is not None and self.max_threads < 1:
            raise UsageError(f"max_threads is below 1: {self.max_threads}", help="use the number of threads to allow")
        if self.rate is not None and self.rate <= 0:
            raise UsageError(f"a rate of {self.rate} bytes a second is not above 0")
        # Written so that what is not a number is refused, too.
        if not 1e-6 <= self.max_pause <= 60:
            raise UsageError(f"a pause of {self.max_pause:g} s is not within 1us and 60s", help="the default is 1ms")
        if not 0 < self.pause_share <= 1:
            message = f"a pause_share of {self.pause_share:g} is not above 0 and at most 1"
            raise UsageError(message, help=f"the default is {PAUSE_SHARE:g}")

        if not 0 <= self.min_split_share <= 1:
            message = f"a min_split_share of {self.min_split_share:g} is not within 0 and 1"
            raise UsageError(message, help="0 leaves no range alone")

    @property
    def max_pause_ns(self) -> int:
        """`max_pause` in nanoseconds."""
        return round(self.max_pause * 1e9)


USUAL_MEANS = Means()
"""What holds where a caller says nothing."""


THREAD_STOP_NS = 30_000
"""Nanoseconds that each thread of the target adds to a window: to stop it, to park it, and to put back its registers.
Measured with bench/bench_mover.py, from 64 threads on; targets of 1 000 and 5 000 threads agree."""

WINDOW_FACTOR = 10
"""A window may be this many times as long as the longest pause that is wanted, because of the threads alone. Servers
have tens to hundreds of threads, which must not be refused; and a window that is longer than that is another order of
cost than the one that the user agreed to."""


def window_ns(threads: int, max_pause_ns: int) -> int:
    """Return how long a window is predicted to be at most, in nanoseconds."""
    return max(max_pause_ns, threads * THREAD_STOP_NS)


def most_threads(max_pause_ns: int) -> int:
    """Return how many threads a target may have by default, so that a window keeps within `WINDOW_FACTOR` pauses."""
    return max(1, WINDOW_FACTOR * max_pause_ns // THREAD_STOP_NS)


def price_of_moving(threads: int, max_pause_ns: int) -> str:
    """Return the price as a clause: ``"injects code, and stops all 64 threads, with an aim of 2 ms at a time"``."""
    who = "it" if threads <= 1 else f"all of its {threads} threads"
    return f"injects code, and stops {who}, with an aim of {window_ns(threads, max_pause_ns) / 1e6:.3g} ms at a time"


def needs_move_reason(price: str) -> str:
    """Return why folios below the PMD order are left alone, with the price and the way to have them made."""
    return f"only the mover makes them here, which {price}: --mechanism move"


SMALL_MEANS = Means(mechanism="madvise,move")
"""What a plan with --small is checked against: the mover has to be asked for by name."""
