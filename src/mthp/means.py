"""The mechanism that collapses blocks, and the bounds on its cost for the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mthp.budget import DEFAULT_BLOAT, AnyAmount, as_amount
from mthp.errors import UsageError

Mechanism = Literal["auto", "madvise", "split", "move", "madvise,move", "khugepaged"]
"""How pages are collapsed: by MADV_COLLAPSE, by that and splits of its folio, by the mover, by each for its orders, or
by the kernel's own khugepaged. ``auto`` uses what the kernel offers. The mover injects code, so the user must name
it."""

MAX_PAUSE_NS = 1_000_000
PAUSE_SHARE = 0.2
"""The default pause in nanoseconds, and the default share of the time in pauses: a busy server keeps most of its
throughput (bench/bench_redis.py)."""


@dataclass(frozen=True, slots=True)
class Means:
    """How to collapse blocks, and the bounds on the cost for the target.

    Attributes:
        mechanism: the mechanism; see :data:`Mechanism`.
        max_bloat: growth of resident memory, in bytes or as a share of the resident bytes, also as a text such as
            ``"10%"``; None without a bound.
        max_copied: bytes that may be copied, or a share of the resident bytes; None without a bound.
        reserve: memory that must stay free below every limit of the target, in bytes or as a share of the limit; None
            for the default (:func:`mthp.budget.kept_free`).
        max_threads: refuse to move memory of a target with more threads; None for the number that `max_pause` allows
            (:func:`mthp.means.most_threads`).
        rate: bytes per second that are collapsed or tried; None without a limit.
        max_pause: seconds that the target's threads may be stopped in one window of the mover.
        pause_share: the part of the time that they may be stopped, above 0, up to 1.
        min_split_share: leave a PMD range alone if splits would put less than this share of its contents into planned
            folios, because all of the contents are copied.
        fill: whether the mover may fill holes, as MADV_COLLAPSE does; if not, blocks with holes are left alone.
        verify: compare a hash of the bytes of every moved block before and after, inside the window.

    Raises:
        UsageError: a mechanism that does not exist, or a number out of range.
    """

    mechanism: Mechanism = "auto"
    max_bloat: AnyAmount = DEFAULT_BLOAT
    max_copied: AnyAmount = None
    reserve: AnyAmount = None
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
        # The condition is negated so that NaN is refused, too.
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
"""The default means."""


THREAD_STOP_NS = 30_000
"""Nanoseconds that each thread of the target adds to a window: to stop it, park it, and restore its registers.
Measured with bench/bench_mover.py, from 64 threads on; targets of 1 000 and 5 000 threads agree."""

WINDOW_FACTOR = 10
"""The threads alone may make a window this many times as long as the wanted pause. Servers have tens to hundreds of
threads, which must not be refused; a longer window costs an order of magnitude more than the user agreed to."""


def window_ns(threads: int, max_pause_ns: int) -> int:
    """Return the predicted longest duration of a window, in nanoseconds."""
    return max(max_pause_ns, threads * THREAD_STOP_NS)


def most_threads(max_pause_ns: int) -> int:
    """Return the default bound on a target's threads, which keeps a window within `WINDOW_FACTOR` pauses."""
    return max(1, WINDOW_FACTOR * max_pause_ns // THREAD_STOP_NS)


def price_of_moving(threads: int, max_pause_ns: int) -> str:
    """Return the price as a clause: ``"injects code, and stops all 64 threads, with an aim of 2 ms at a time"``."""
    stopped = "it" if threads <= 1 else f"all of its {threads} threads"
    return (
        f"injects code, and stops {stopped}, with an aim of {window_ns(threads, max_pause_ns) / 1e6:.3g} ms at a time"
    )


def needs_move_reason(price: str) -> str:
    """Return why folios below the PMD order are left alone, with the price and the option that makes them."""
    return f"only the mover makes them here, which {price}: --mechanism move"


SMALL_MEANS = Means(mechanism="madvise,move")
"""The means that a plan with --small is checked against, because the user must name the mover."""
