"""The folios below the PMD order that were made in one target, and whether they last.

The kernel's own khugepaged makes huge folios of them again where max_ptes_none lets it (:mod:`mthp.engine.lasting`).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mthp.addrspace import AddressSpace
from mthp.daemon.environment import Environment
from mthp.daemon.rules import Rule
from mthp.engine.lasting import Remade, remade
from mthp.geometry import Geometry
from mthp.naming import ProcessFacts
from mthp.outline import Outline
from mthp.results import BlockOutcome, ScanResult


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
        self._ranges = ours.address
        self.remade = remade(space, ours.address, space.geometry.ptes_per_pmd - ours.present.astype(np.int64))
        if not self.remade.ranges:
            return
        environment.event("not_lasting", pid=facts.pid, comm=facts.comm, reason=self.remade.remark)
        remark = f"process {facts.pid} ({facts.comm}): {self.remade.remark}"
        if self.remade.keeps is not None:
            remark += f"; keep_max_ptes_none = {self.remade.keeps} in the rules file has the daemon see to that"
        environment.say_once(("not_lasting", rule.name), remark)
