"""The mover's view of a process: :class:`MoveTarget`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.geometry import Geometry
from mthp.linux.process import Process
from mthp.ptes import PteColumns, Segment


@dataclass(frozen=True, slots=True)
class MoveTarget:
    """A process with memory to be moved.

    Attributes:
        process: the process; the caller keeps it open and closes it.
        read: function that reads the page table entries of segments, one after another.
        mapcounts: function that returns how often each page of such entries is mapped, if they have frame numbers.
    """

    process: Process
    geometry: Geometry
    read: Callable[[Sequence[Segment]], PteColumns]
    mapcounts: Callable[[PteColumns], NDArray[np.int64]]
