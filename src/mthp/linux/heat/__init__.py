"""Measure the accesses of a process by DAMON, idle page tracking, or young bits; the best that this machine has.

- :mod:`~mthp.linux.heat.damon` samples each PMD range, by virtual addresses or by the frames behind them. It does not
  disturb reclaim: where it clears a young bit, it records that the folio is young.
- :mod:`~mthp.linux.heat.idle_tracking` samples single pages of each PMD range, and does not disturb reclaim either.
- :mod:`~mthp.linux.heat.young` measures the used part of each mapping. Its pages look unused to reclaim until used.

Each measures until its time is over, or `stop` returns True. A source uses at most :data:`MAX_SHARE` of one processor:
the intervals between two samples grow until that is so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from mthp.errors import MthpError, NotPermittedError, UnsupportedError
from mthp.heat import Heat, HeatRequest
from mthp.linux.processspace import ProcessSpace
from mthp.ptes import Segment
from mthp.vma import VmaKind

MAX_SHARE = 0.05
"""The share of one processor that measuring may use, kernel threads included: a collapse saves a few per cent of a
program's time, which must not be spent beforehand."""

ROUND_SECONDS = 1.0
"""Shortest time between two reads of all pages, in seconds, for sources that read all pages at once."""

PATIENCE = 0.05
"""Seconds between two checks whether to stop."""

Stop = Callable[[], bool]


def measure_heat(space: ProcessSpace, request: HeatRequest, stop: Stop) -> Heat:
    """Return the accesses of `space` for the time, and by the source, of `request`.

    Raises:
        UnsupportedError: this kernel lacks the source, or another program uses it; for ``auto`` with the reason against
            each of them.
        NotPermittedError: these rights are not sufficient; for ``auto`` as above.
        TargetVanishedError: the process is gone.
    """
    # Imported here: each needs these helpers.
    from mthp.linux.heat.damon import Damon
    from mthp.linux.heat.idle_tracking import IdlePages
    from mthp.linux.heat.young import measure_young

    sources = {"damon": Damon().measure, "idle": IdlePages().measure, "young": measure_young}
    if request.source != "auto":
        return sources[request.source](space, request.seconds, stop)
    # In the order of what they disturb: only the last one makes pages look unused to reclaim.
    reasons: list[str] = []
    permitted = False
    for name, measure in sources.items():
        try:
            return measure(space, request.seconds, stop)
        except (UnsupportedError, NotPermittedError) as error:
            permitted |= isinstance(error, UnsupportedError)
            reasons.append(f"{name}: {error.message}")
    kind: type[MthpError] = UnsupportedError if permitted else NotPermittedError
    raise kind(f"no source of heat works: {'; '.join(reasons)}", help="see the lines heat_* of `mthp doctor`")


def anonymous_segments(space: ProcessSpace) -> list[Segment]:
    """Return the whole PMD ranges in which anonymous memory of `space` may be populated, without overlap."""
    size = space.geometry.pmd_size
    whole = [(vma.start, vma.end) for vma in space.vmas() if vma.kind is VmaKind.ANON]
    # Smaller mappings cannot hold a folio of the PMD size, and would cost samples.
    return space.populated([segment for segment in whole if segment[1] - segment[0] >= size], size)


def pmd_pieces(segments: list[Segment], size: int, most: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Cut `segments` at multiples of `size`, or of a multiple of it that leads to about `most` pieces.

    Returns:
        Start and end of each piece: uint64, shape (pieces,).
    """
    total = sum(end - start for start, end in segments)
    size *= max(1, -(-total // (size * most)))
    starts, ends = [], []
    for start, end in segments:
        cuts = np.arange(start // size * size + size, end, size, dtype=np.uint64)
        starts.append(np.concatenate([np.array([start], np.uint64), cuts]))
        ends.append(np.concatenate([cuts, np.array([end], np.uint64)]))
    if not starts:
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    return np.concatenate(starts), np.concatenate(ends)


def rounds(seconds: float, stop: Stop) -> Iterator[None]:
    """Yield after every round in which the target may use its memory; the caller then reads all pages.

    A round is long enough to keep the processor time of this process, and of the kernel for it, at :data:`MAX_SHARE`.
    """
    end, length = time.monotonic() + seconds, min(ROUND_SECONDS, seconds)
    while True:
        if (left := end - time.monotonic()) <= 0:
            return
        wait(min(length, left), stop)
        begin = time.process_time()
        yield
        if stop():
            return
        # The next round is long enough for the read that was just made; a short one does not shorten it again.
        length = max(length, (time.process_time() - begin) / MAX_SHARE)


def wait(seconds: float, stop: Stop) -> None:
    """Wait `seconds`; less once `stop` returns True."""
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not stop():
        time.sleep(min(left, PATIENCE))


def not_permitted(path: os.PathLike[str], error: OSError) -> NotPermittedError:
    """Return the error for a file that may not be used."""
    return NotPermittedError(f"{os.fspath(path)}: {error.strerror}", help="run as root, with /sys mounted read-write")
