"""By what means blocks are collapsed, and what that may cost the target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mthp.budget import Amount

Mechanism = Literal["auto", "madvise", "move", "madvise,move", "khugepaged"]
"""How pages are collapsed: by MADV_COLLAPSE, by the mover, by each where it fits the order, or by the kernel's own
khugepaged. ``auto`` is whatever the kernel does by itself: the mover injects code, so it must be asked for by name."""

MAX_PAUSE_NS = 1_000_000
DUTY = 0.2
"""How long a target stands still at a time by default, and for what part of the time: a busy server keeps most of its
throughput (bench/bench_redis.py)."""


@dataclass(frozen=True, slots=True)
class Means:
    """By what means blocks are collapsed, and what that may cost the target.

    Attributes:
        mechanism: what collapses them; see :data:`Mechanism`.
        max_pause_ns: how long the target's threads may stand still in one window of the mover, in nanoseconds.
        duty: the part of the time that they may stand still, above 0, up to 1.
        fill: whether the mover may fill holes; the kernel's call always does.
        verify: compare a hash of the bytes of every moved block before and after, inside the window.
        reserve: memory that must stay free below every limit of the target; None for the default.
        max_threads: refuse to move memory of a target with more threads; None for what `max_pause_ns` allows.
    """

    mechanism: Mechanism = "auto"
    max_pause_ns: int = MAX_PAUSE_NS
    duty: float = DUTY
    fill: bool = False
    verify: bool = False
    reserve: Amount | None = None
    max_threads: int | None = None


USUAL_MEANS = Means()
"""What holds where a caller says nothing."""
