"""A file of this project, opened as an address space, whichever kind it is."""

from __future__ import annotations

import os

from mthp.addrspace import AddressSpace
from mthp.errors import UsageError
from mthp.snapshot.load import load
from mthp.snapshot.recording import Recording
from mthp.snapshot.stream import is_recording


def open_file(path: str | os.PathLike[str], *, at: str | None = None) -> AddressSpace:
    """Open a snapshot, or one step of a recording.

    Args:
        at: which step of a recording, as :meth:`~mthp.snapshot.recording.Recording.step_at` reads it; the last by
            default.

    Raises:
        UsageError: neither of them, damaged, or a step that there is not.
    """
    if is_recording(path):
        recording = Recording(path)
        return recording.space(recording.step_at(at))
    if at is not None:
        raise UsageError(f"{os.fspath(path)} is a snapshot, which has no step {at!r}", help="leave --at out")
    return load(path)
