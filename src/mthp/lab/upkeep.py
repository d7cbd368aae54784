"""mthp on the machine of a simulation, where it visits programs in khugepaged's place, and trims them."""

from __future__ import annotations

from collections.abc import Iterable

from mthp.engine.khugepaged import Khugepaged
from mthp.engine.trim import TrimOptions, trim_space
from mthp.engine.visited import Passage, RestClock, VisitedSpace
from mthp.lab.makers import Maker
from mthp.lab.scenariotables import TrimSettings
from mthp.lab.workloads.program import Program
from mthp.means import Means
from mthp.sim import Machine, SimSpace


class Upkeep:
    """mthp on one simulated machine.

    Args:
        machine: the machine.
        maker: the maker of folios; mthp visits programs if it splits.
        time: clock that lets the programs act while mthp rests.

    Attributes:
        khugepaged: mthp's visitor of the programs; None if the kernel's khugepaged visits them.
        given_back_bytes: bytes that all trims gave back.
        trim_ns: simulated nanoseconds that the trims took.
    """

    def __init__(self, machine: Machine, maker: Maker, time: RestClock) -> None:
        self.given_back_bytes = 0
        self.trim_ns = 0
        self.khugepaged: Khugepaged | None = None
        self._machine = machine
        self._spaces: dict[int, SimSpace] = {}
        if maker.splits:
            self.khugepaged = Khugepaged(
                policy=maker.policy,
                means=Means(mechanism="split"),
                tunables=lambda: machine.parts.tunables,
                clock=time,
                listener=self._account,
            )

    def enter(self, program: Program) -> None:
        """Visit `program` from now on, as soon as anything in it may be collapsed."""
        if self.khugepaged is not None and program.alive:
            # The same space each time, by which khugepaged knows a program again.
            space = self._spaces.setdefault(id(program), self._machine.space(program.mm))
            self.khugepaged.enter(space)

    def _account(self, space: VisitedSpace, passage: Passage) -> None:
        # Reading a pagemap entry is assumed to cost as much as khugepaged's scan of a PTE.
        self._machine.clock.spend("scan_range", len(passage.results))
        self._machine.clock.spend("scan_pte", passage.progress)

    def trim(self, programs: Iterable[Program], settings: TrimSettings) -> None:
        """Trim `programs`, unless enough memory is free."""
        memory, clock = self._machine.parts.memory, self._machine.clock
        if settings.free < 1 and memory.free_frames >= settings.free * len(memory.refcount):
            return
        for program in programs:
            # The work of trims is not khugepaged's (_Run._whole).
            before = clock.now_ns
            report = trim_space(self._machine.space(program.mm), TrimOptions(zero=settings.zero))
            self.given_back_bytes += report.given_back_bytes
            self.trim_ns += clock.now_ns - before
