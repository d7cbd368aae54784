"""The numbered steps of a window, for whoever wants to follow them: tests that let the tracer die at each."""

from __future__ import annotations

import enum
from collections.abc import Callable


class Step(enum.IntEnum):
    """What has just been done."""

    STOPPED = enum.auto()
    """All threads stand still."""
    LOADED = enum.auto()
    """The boot code lies in the padding; no register was changed yet."""
    BOOTED = enum.auto()
    """One thread has the registers of the boot code, and still its own signal mask."""
    MAPPED = enum.auto()
    """That thread has made one more of the calls that map the memory for the stub."""
    WRITTEN = enum.auto()
    """Contexts and operations are in place; no register was changed yet."""
    PARKED_UNMASKED = enum.auto()
    """One more thread has the registers of the parking loop, and still its own signal mask."""
    PARKED = enum.auto()
    """One more thread is parked."""
    ARMED = enum.auto()
    """The worker has its registers, and stands still."""
    RUNNING = enum.auto()
    """The worker runs."""
    DONE = enum.auto()
    """The worker has said that it is done."""
    FETCHED = enum.auto()
    """The worker stands still again."""
    UNPARKED = enum.auto()
    """One more thread has its own registers and mask."""
    UNMAPPING = enum.auto()
    """All but the worker have their own registers; the worker is about to unmap everything."""
    UNMAPPED = enum.auto()
    """The mapping is gone."""
    RELEASED = enum.auto()
    """One more thread was let go."""


Observer = Callable[[Step], None]
"""Called in the tracing thread, inside the window: it had better be quick."""


def ignore(step: Step) -> None:
    """The observer that does nothing."""
