"""`mthp.Khugepaged`: khugepaged in user space, over address spaces of any kind.

>>> import mthp
>>> from mthp.targets import open_target
>>> daemon = mthp.Khugepaged(policy="mainline", orders="64K,2M")
>>> with open_target("self") as space:
...     daemon.enter(space)
...     daemon.do_scan()
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mthp.addrspace import AddressSpace
from mthp.engine.scanner import Listener, Scanner
from mthp.engine.select import ORDERS_ENABLED, PlanOptions
from mthp.engine.visit import Visit
from mthp.engine.visited import RestClock, WallClock
from mthp.errors import UsageError
from mthp.geometry import X86_64
from mthp.tunables import Tunables

_OF_VISITS = frozenset({"means", "admit", "choose"})


class Khugepaged(Scanner):
    """Visits address spaces: live processes, simulated ones, anything behind the seam.

    One thread creates it and scans (:meth:`do_scan`, :meth:`run`). Other threads may call :meth:`enter`, :meth:`exit`,
    :meth:`wake` and :meth:`stop`, and read the counters.

    Args:
        tunables: the pace: ``pages_to_scan``, ``scan_sleep_millisecs``, ``alloc_sleep_millisecs``; a function is called
            at every pass; by default the present tunables of the machine.
        clock: the time; by default that of this machine. Pass a simulated machine's ``machine.time``, so that its rests
            take no real time.
        listener: called in the scanning thread with every :class:`~mthp.engine.visited.Passage`: the scanned ranges
            with their scan results, and the attempts with their copied and filled pages.
        options: what to choose, as the fields of :class:`~mthp.engine.select.PlanOptions`, by default the orders that
            the machine's switches allow each mapping at each moment; and `means`, `admit` and `choose` of
            :class:`~mthp.engine.visit.Visit`.

    Raises:
        UsageError: an option does not exist.
    """

    def __init__(
        self,
        *,
        tunables: Tunables | Callable[[], Tunables] | None = None,
        clock: RestClock | None = None,
        listener: Listener | None = None,
        **options: Any,
    ) -> None:
        self._time = clock or WallClock()
        self._pace = tunables
        self._options = options
        self._checked(options)
        super().__init__(self._current_tunables, self._time, listener)

    @property
    def visits(self) -> tuple[Visit, ...]:
        """The address spaces that are visited, in order."""
        return tuple(slot for slot in self.slots if isinstance(slot, Visit))

    def enter(self, space: AddressSpace, **options: Any) -> bool:
        """Visit `space` from now on, if anything in it may be collapsed; entering it twice changes nothing.

        The space stays open. The caller closes it, after :meth:`exit`, or once it is no longer visited because its
        process is gone.

        Args:
            options: options for this space, on top of this object's.

        Returns:
            Whether the space is visited. If not, nothing was kept; try again when the process has grown.

        Raises:
            UsageError: an unknown policy, or an order or a limit that does not exist on its geometry.
        """
        if any(visit.space is space for visit in self.visits):
            return True
        choice, others = self._checked(self._options | options)
        visit = Visit(space, choice, clock=self._time, **others)
        if not visit.wanted:
            return False
        self.add(visit)
        return True

    def exit(self, space: AddressSpace) -> None:
        """Stop visiting `space`; if it is being scanned, as soon as that ends."""
        for visit in self.visits:
            if visit.space is space:
                self.remove(visit)

    @staticmethod
    def _checked(options: dict[str, Any]) -> tuple[PlanOptions, dict[str, Any]]:
        """Return what to choose, and the other options of a visit.

        Raises:
            UsageError: an option does not exist.
        """
        others = {name: value for name, value in options.items() if name in _OF_VISITS}
        chosen = {name: value for name, value in options.items() if name not in _OF_VISITS}
        try:
            return PlanOptions(**{"orders": ORDERS_ENABLED} | chosen), others
        except TypeError as error:
            raise UsageError(str(error).replace("PlanOptions.__init__()", "khugepaged's options:")) from None

    def _current_tunables(self) -> Tunables:
        if isinstance(self._pace, Tunables):
            return self._pace
        if self._pace is not None:
            return self._pace()
        visits = self.visits
        return visits[0].space.tunables if visits else Tunables.defaults(X86_64)
