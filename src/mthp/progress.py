"""The progress of long work, in a unit that its caller shows: mostly bytes of address space."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from mthp.ptes import Segment, bytes_in

Progress = Callable[[int, int], None]
"""Called with (done, in all) after every piece of work."""


class Reading:
    """The progress of reading segments.

    Args:
        progress: called after every block; None to tell nothing.
        segments: all segments to be read.
    """

    def __init__(self, progress: Progress | None, segments: Iterable[Segment]) -> None:
        self._progress, self._total, self._done = progress, bytes_in(segments), 0

    def has_read(self, block: Iterable[Segment]) -> None:
        """Count a block as read."""
        self._done += bytes_in(block)
        if self._progress is not None:
            self._progress(self._done, self._total)
