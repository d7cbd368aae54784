"""The progress of long work, in a unit that its caller shows: mostly bytes of address space."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mthp.ptes import Segment, bytes_in

Progress = Callable[[int, int], None]
"""Called with (done, in all) after every piece of work."""

StepProgress = Callable[[int, int, str], None]
"""Called with (done, in all, name of the step) after every piece of work of several steps."""


class ReadProgress:
    """The progress of reading segments.

    Args:
        progress: called after every portion; None for no calls.
        segments: all segments to be read.
    """

    def __init__(self, progress: Progress | None, segments: Iterable[Segment]) -> None:
        self._progress, self._total, self._done = progress, bytes_in(segments), 0

    def has_read(self, portion: Iterable[Segment]) -> None:
        """Count a portion as read."""
        self._done += bytes_in(portion)
        if self._progress is not None:
            self._progress(self._done, self._total)
