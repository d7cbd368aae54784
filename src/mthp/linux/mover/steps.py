"""The numbered steps of a window, and the observer that follows them: tests kill the tracer at each."""

from __future__ import annotations

import enum
from collections.abc import Callable


class Step(enum.IntEnum):
    """The step that has just been done."""

    STOPPED = enum.auto()
    """All threads are stopped."""
    LOADED = enum.auto()
    """The boot code lies in the padding; no register was changed yet."""
    BOOTED = enum.auto()
    """One thread has the registers of the boot code, and still its own signal mask."""
    MAPPED = enum.auto()
    """That thread, the worker, has mapped the memory for the stub, and waits until the stub is written."""
    WRITTEN = enum.auto()
    """Code, contexts and operations are in place, and the worker is parked."""
    PARKED_UNMASKED = enum.auto()
    """One more thread has the registers of the parking loop, and still its own signal mask."""
    PARKED = enum.auto()
    """One more thread is parked."""
    RUNNING = enum.auto()
    """The worker may begin."""
    DONE = enum.auto()
    """The worker has set the state DONE."""
    UNPARKED = enum.auto()
    """One more thread has its own registers and mask."""
    UNMAPPING = enum.auto()
    """All but the worker have their own registers; the worker is about to unmap everything."""
    UNMAPPED = enum.auto()
    """The mapping is gone."""
    FETCHED = enum.auto()
    """The worker is stopped again."""
    RELEASED = enum.auto()
    """One more thread was released."""


Observer = Callable[[Step], None]

_observers: list[Observer] = []
"""The observer of :func:`observe`; none or one."""


def observe(by: Observer | None) -> None:
    """Call `by` after every step, in the tracing thread and inside the window, so it should be quick; None ends it."""
    _observers[:] = [] if by is None else [by]


def is_observed() -> bool:
    """Return whether there is an observer."""
    return bool(_observers)


def reached(step: Step) -> None:
    """Call the observer, if there is one."""
    for observer in _observers:
        observer(step)
