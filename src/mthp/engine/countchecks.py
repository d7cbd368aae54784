"""The checks of a scan or an attempt that the counts of a run decide, for all runs of an order at once.

:mod:`mthp.engine.checks` reads the single PTEs of the others.
"""

from __future__ import annotations

from collections.abc import Iterator

from mthp.engine.bits import Bits
from mthp.engine.checks import Checks
from mthp.engine.occupancy import Runs


def stopped_by_counts(runs: Runs, checks: Checks) -> Bits | None:
    """Return which runs fail a check other than that for a large folio; None if no run can."""
    stopped: Bits | None = None
    for bits in _stops(runs, checks):
        stopped = bits if stopped is None else stopped | bits
    return stopped


def _stops(runs: Runs, checks: Checks) -> Iterator[Bits]:
    """Yield the runs that fail each check other than that for a large folio."""
    given, count = runs.occupancy.given, runs.occupancy.count
    # A limit that is at least the size of the run cannot be exceeded, so nothing is counted for it.
    if checks.limits.none < runs.size:
        contents = runs.occupied + runs.swap if "swap" in given else runs.occupied
        yield contents < runs.size - checks.limits.none
    armed = runs.occupancy.planes.uffd_armed if "uffd_armed" in given and checks.zero_none_if_armed else None
    # A filled PTE would never fault, so the process that handles the faults would miss it (userfaultfd_armed(),
    # used in mm/khugepaged.c).
    if armed is not None:
        yield armed[:, None] & (runs.none_or_zero > 0)
    if "swap" in given and checks.limits.swap < runs.size:
        yield runs.swap > checks.limits.swap
    if "shared" in given and checks.limits.shared < runs.size:
        yield runs.shared > checks.limits.shared
    if checks.guard and "guard" in given:
        yield count("guard", runs.order) > 0
    if checks.uffd and "uffd" in given:
        yield count("uffd", runs.order) > 0
    if checks.lazyfree and "lazyfree" in given:
        yield count("lazyfree", runs.order) > 0
    if checks.page:
        yield (runs.occupied + runs.swap == 0) if "swap" in given else (runs.occupied == 0)
    if checks.references:
        # A run with a limit on holes has a page, which is referenced unless a plane says otherwise.
        if checks.limits.none >= runs.size - 1 or "unreferenced" in given or "swap" in given:
            yield runs.referenced == 0
        if "swap" in given and checks.references > 1:
            yield (runs.swap > 0) & (runs.referenced < checks.references)
