"""What moving pages costs a target: how long each stop takes, and how many threads a target may have for that."""

from __future__ import annotations

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
