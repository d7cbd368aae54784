"""The common base of recorded address spaces: they can be read, but not changed."""

from __future__ import annotations

from typing import Any

from mthp.addrspace import AddressSpace
from mthp.errors import UnsupportedError
from mthp.heat import Heat
from mthp.results import BlockOutcome
from mthp.snapshot.description import Description
from mthp.vma import Vma


def _as_recorded(name: str) -> Any:
    """Return a property of a recorded space: the field `name` of its description."""
    return property(lambda space: getattr(space._description, name))


class RecordedSpace(AddressSpace):
    """The base of address spaces in files.

    They can be read and planned on, not collapsed; frames are not recorded.

    Args:
        description: recorded description of the target and its machine.
    """

    def __init__(self, description: Description, path: str, kind: str) -> None:
        self._description = description
        self._path = path
        self._kind = kind

    geometry = _as_recorded("geometry")
    label = _as_recorded("label")
    service = _as_recorded("service")
    kernel = _as_recorded("kernel")
    switches = _as_recorded("switches")
    tunables = _as_recorded("tunables")
    thp_disabled = _as_recorded("thp_disabled")
    missing = _as_recorded("missing")

    @property
    def recorded_heat(self) -> Heat | None:
        """The heat as recorded."""
        return self._description.heat

    def vmas(self) -> list[Vma]:
        return list(self._description.vmas)

    def attempt(self, address: int, order: int) -> BlockOutcome:
        raise UnsupportedError(
            f"{self._path} is a {self._kind}, which cannot be collapsed",
            help=f"plan it: mthp plan {self._path}; or name a live process by its PID",
        )
