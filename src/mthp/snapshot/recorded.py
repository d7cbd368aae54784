"""What all recorded address spaces share: they say what was, and nothing happens in them any more."""

from __future__ import annotations

from mthp.addrspace import AddressSpace
from mthp.errors import UnsupportedError
from mthp.geometry import Geometry
from mthp.heat import Heat
from mthp.results import BlockOutcome
from mthp.snapshot.description import Description
from mthp.tunables import Switches, Tunables
from mthp.vma import Vma


class RecordedSpace(AddressSpace):
    """The base of address spaces in files. They can be read and planned on, not collapsed; frames are not recorded.

    Args:
        description: what was recorded of the target and its machine.
    """

    def __init__(self, description: Description, path: str, kind: str) -> None:
        self._description = description
        self._path = path
        self._kind = kind

    @property
    def geometry(self) -> Geometry:
        """As recorded."""
        return self._description.geometry

    @property
    def label(self) -> str:
        """As recorded."""
        return self._description.label

    @property
    def kernel(self) -> str:
        """As recorded."""
        return self._description.kernel

    @property
    def switches(self) -> Switches:
        """As recorded."""
        return self._description.switches

    @property
    def tunables(self) -> Tunables:
        """As recorded."""
        return self._description.tunables

    @property
    def thp_disabled(self) -> bool:
        """As recorded."""
        return self._description.thp_disabled

    @property
    def missing(self) -> tuple[str, ...]:
        """As recorded."""
        return self._description.missing

    @property
    def recorded_heat(self) -> Heat | None:
        """As recorded."""
        return self._description.heat

    def vmas(self) -> list[Vma]:
        """As recorded."""
        return list(self._description.vmas)

    def attempt(self, address: int, order: int) -> BlockOutcome:
        """Not possible: nothing runs here.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"{self._path} is a {self._kind}, which cannot be collapsed",
            help=f"plan it: mthp plan {self._path}; or name a live process by its PID",
        )
