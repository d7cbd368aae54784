"""What of a plan a collapse would do, as its mechanism and its bounds allow at this moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mthp.abilities import threads
from mthp.addrspace import AddressSpace
from mthp.engine.admission import bloat_budget, room_of
from mthp.engine.space_plan import SpacePlan
from mthp.geometry import Geometry
from mthp.means import Means, Mechanism
from mthp.price import needs_move_reason, price_of_moving


@dataclass(frozen=True, slots=True)
class LeftFolios:
    """Folios of one order that would not be made.

    Attributes:
        order: of the folios.
        count: how many.
        reason: why, as a clause with the way to have them made.
    """

    JSON: ClassVar = "order folios=count bytes=size reason"

    order: int
    count: int
    reason: str

    def size(self, geometry: Geometry) -> int:
        """Return their bytes."""
        return self.count * geometry.size_of(self.order)


@dataclass(frozen=True, slots=True)
class Allowed:
    """What a collapse would do.

    Attributes:
        folios_by_order: how many folios of which order it would make, the largest order first.
        filled_bytes: what that would add.
        bloat_budget: bytes that filling may add; None for no bound.
        left: planned folios that it would not make.
    """

    JSON: ClassVar = "folios_by_order bloat_bytes=filled_bytes bloat_budget_bytes=bloat_budget left"

    folios_by_order: dict[int, int]
    filled_bytes: int
    bloat_budget: int | None
    left: tuple[LeftFolios, ...]


def mechanisms_of(space: AddressSpace, plan: SpacePlan, means: Means) -> dict[int, Mechanism | None]:
    """Return what makes the folios of each planned order, the largest first; None for nothing that was asked for."""
    found: dict[int, Mechanism | None] = {}
    for order in plan.folios_by_order:
        made = space.mechanism_for(order, means.mechanism)
        if made is None and order == space.geometry.pmd_order:
            # Planned since the system's switches or the caller want it: those who ask for moving only are refused.
            made = "madvise"
        # khugepaged keeps to no rate.
        if made is None and means.mechanism == "auto" and not means.rate and space.drives_khugepaged(order):
            made = "khugepaged"
        found[order] = made
    return found


def allowed_of(space: AddressSpace, plan: SpacePlan, means: Means) -> Allowed:
    """Return what a collapse of `space` would do now.

    Raises:
        TargetVanishedError: the process is gone.
    """
    budget, room = bloat_budget(space, means), room_of(space, means)
    spare, page_size = room.spare, plan.geometry.page_size
    made: dict[int, int] = {}
    left: list[LeftFolios] = []
    filled_bytes = 0
    for order, mechanism in mechanisms_of(space, plan, means).items():
        size = plan.geometry.size_of(order)
        # As a collapse goes: the fullest first, so that a bound cuts the list in two.
        fill = np.sort(plan.folios.filled[plan.folios.order == order].astype(np.int64)) * page_size
        if mechanism is None:
            price = price_of_moving(threads(space), means.max_pause_ns)
            left.append(LeftFolios(order, len(fill), needs_move_reason(price)))
            continue
        if mechanism in ("move", "khugepaged") and not means.fill:
            fill = fill[fill == 0]
            if holes := plan.folios_by_order[order] - len(fill):
                left.append(LeftFolios(order, holes, "they have holes: --fill fills them"))
        through = filled_bytes + np.cumsum(fill)
        within = len(fill) if budget is None else int(np.searchsorted(through, budget, side="right"))
        fitting = len(fill) if spare is None else int(np.searchsorted(through - fill + size, spare, side="right"))
        if within < min(fitting, len(fill)):
            more = f"filling them would add more than --max-bloat {means.max_bloat}"
            left.append(LeftFolios(order, len(fill) - within, more))
        elif fitting < len(fill):
            left.append(LeftFolios(order, len(fill) - fitting, f"{room.reason}: --reserve"))
        if count := min(within, fitting):
            made[order] = count
            filled_bytes = int(through[count - 1])
    return Allowed(made, filled_bytes, budget, tuple(left))
