"""What is kept of one target between two passes.

- :class:`Sign`: the signs that its memory may have changed.
- :class:`HeatKeeper`: its used memory, sampled in a separate thread while the worker goes on with other processes.
- :class:`PartTurns`: the times at which its memory outside of whole PMD ranges is planned.
- :class:`SmallFolios`: the folios below the PMD order that were made in it, and whether they last. The kernel's own
  khugepaged makes huge folios of them again where max_ptes_none lets it (:mod:`mthp.engine.lasting`).
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from mthp.abilities import heat_of
from mthp.addrspace import AddressSpace
from mthp.daemon.environment import Environment
from mthp.daemon.rules import Rule
from mthp.engine.lasting import Remade, remade
from mthp.errors import MthpError
from mthp.geometry import Geometry
from mthp.heat import Heat, HeatRequest
from mthp.naming import ProcessFacts
from mthp.outline import Outline
from mthp.pacing import Backoff
from mthp.results import BlockOutcome, ScanResult


@dataclass(frozen=True, slots=True)
class Sign:
    """The fields of ``/proc/PID/stat`` that change when memory may have been mapped.

    Attributes:
        faults: page faults so far.
        mapped: bytes of its mappings.
        resident: pages; not compared.
    """

    faults: int
    mapped: int
    resident: int = field(compare=False)
    comm: bytes

    @classmethod
    def parse(cls, text: bytes) -> Sign:
        """Return the fields in the text of ``/proc/PID/stat`` (proc_pid_stat(5))."""
        # The name in parentheses may contain anything, parentheses included.
        end = text.rindex(b")")
        fields = text[end + 2 :].split(maxsplit=23)
        return cls(int(fields[7]) + int(fields[9]), int(fields[20]), int(fields[21]), text[text.index(b"(") + 1 : end])


FRESH_SECONDS = 300.0
"""Seconds for which heat is valid. A measurement takes some seconds, so it runs for a hundredth of the time."""


class HeatKeeper:
    """The heat of one process.

    Attributes:
        heat: last measurement; None if there is none, or if it failed.
    """

    def __init__(self, environment: Environment, pid: int) -> None:
        self.heat: Heat | None = None
        self._environment, self._pid = environment, pid
        self._thread: threading.Thread | None = None
        self._at = -math.inf
        self._closed = False

    @property
    def measuring(self) -> bool:
        """Whether a measurement is running."""
        return self._thread is not None and self._thread.is_alive()

    def is_there(self, now: float, request: HeatRequest | None) -> bool:
        """Return whether heat is measured, unavailable or not wanted (None); if not, begin to measure it."""
        if request is None:
            self.heat = None
            return True
        if self.measuring:
            return False
        if self._thread is not None:
            # It has ended: what it found is valid from now on.
            self._thread, self._at = None, now
        if now - self._at < FRESH_SECONDS:
            return True
        self._thread = threading.Thread(target=self._measure, args=(request,), name="mthp-heat", daemon=True)
        self._thread.start()
        return False

    def _measure(self, request: HeatRequest) -> None:
        self.heat = None
        with contextlib.suppress(MthpError), self._environment.opened(self._pid) as space:
            self.heat = heat_of(space, request, lambda: self._closed or self._environment.stopping())

    def close(self) -> None:
        """End a measurement as soon as possible."""
        self._closed = True


PART_SECONDS = 60.0, 3600.0
"""Least seconds between two plans of memory outside of whole PMD ranges, and the most: each plan of which nothing is
made doubles them, because the mover stops the target also for blocks that it then refuses.
"""


class PartTurns:
    """The times at which memory outside of whole PMD ranges is planned: once after changes, and not too often."""

    def __init__(self) -> None:
        self._changed = False
        self._rest = Backoff()

    def changed(self) -> None:
        """Note that the memory may have changed."""
        self._changed = True

    def due(self, now: float) -> bool:
        """Return whether it is time for a plan."""
        return self._changed and not self._rest.rests(now)

    def planned(self, now: float) -> None:
        """Note that a plan was made."""
        self._changed = False
        self._rest.failed(now, *PART_SECONDS)

    def made(self, now: float) -> None:
        """Note that a folio was made, so that the next plan is soon."""
        self._rest = Backoff()
        self._rest.failed(now, *PART_SECONDS)


class SmallFolios:
    """The small folios of one target.

    Attributes:
        remade: prediction of those that khugepaged will make huge again.
    """

    remade: Remade

    def __init__(self) -> None:
        self.remade = Remade()
        self._ranges = np.empty(0, np.uint64)
        self._due = False

    def stale(self) -> None:
        """Predict again at the next :meth:`look`, because switches, tunables or rules changed."""
        self._due = True

    def note(self, attempts: Iterable[BlockOutcome], geometry: Geometry) -> None:
        """Note the folios that were made."""
        found = [
            attempt.address // geometry.pmd_size * geometry.pmd_size
            for attempt in attempts
            if attempt.result is ScanResult.SUCCEED and attempt.order < geometry.pmd_order
        ]
        if found:
            self._ranges = np.union1d(self._ranges, np.array(found, np.uint64))
            self._due = True

    def look(
        self, environment: Environment, space: AddressSpace, outline: Outline, facts: ProcessFacts, rule: Rule
    ) -> None:
        """Predict what lasts, if the prediction is stale, and warn once for a rule of folios that do not.

        Args:
            outline: current outline of all that may be collapsed.

        Raises:
            TargetVanishedError: the process is gone.
        """
        if not self._due:
            return
        self._due = False
        ours = outline[np.isin(outline.address, self._ranges) & ~outline.pmd_mapped]
        # The others are empty, or huge by now.
        self._ranges = ours.address
        self.remade = remade(space, ours.address, space.geometry.ptes_per_pmd - ours.present.astype(np.int64))
        if not self.remade.ranges:
            return
        environment.event_of(facts, "not_lasting", reason=self.remade.remark)
        remark = f"process {facts.pid} ({facts.comm}): {self.remade.remark}"
        if self.remade.keeps is not None:
            remark += f"; keep_max_ptes_none = {self.remade.keeps} in the rules file sets it while the daemon runs"
        environment.say_once(("not_lasting", rule.name), remark)
