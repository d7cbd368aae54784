"""The part of a plan that its mechanism and its bounds allow at this moment."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mthp.abilities import threads
from mthp.addrspace import AddressSpace
from mthp.engine.admission import bloat_budget, copy_budget, room_of
from mthp.engine.space_plan import SpacePlan
from mthp.engine.splitprice import SplitPrice, SplitRanges
from mthp.geometry import Geometry
from mthp.means import Means, Mechanism, needs_move_reason, price_of_moving
from mthp.splitchecks import LITTLE_PLANNED


@dataclass(frozen=True, slots=True)
class LeftFolios:
    """Folios of one order that would not be made.

    Attributes:
        order: order of the folios.
        count: number of folios.
        reason: why, as a clause that names the option that would allow them.
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
    """The predicted outcome of a collapse.

    Attributes:
        folios_by_order: number of folios that it would make, by order, the largest order first.
        filled_bytes: bytes that filling their holes would add.
        bloat_budget: bytes that filling may add; None without a bound.
        left: planned folios that it would not make.
    """

    JSON: ClassVar = "folios_by_order bloat_bytes=filled_bytes bloat_budget_bytes=bloat_budget left"

    folios_by_order: dict[int, int]
    filled_bytes: int
    bloat_budget: int | None
    left: tuple[LeftFolios, ...]


def mechanism_of(space: AddressSpace, order: int, means: Means) -> Mechanism | None:
    """Return the mechanism that makes folios of `order` in `space`; None if no requested one can.

    This is the only place that decides what ``auto`` means.
    """
    made = space.mechanism_for(order, means.mechanism)
    # The kernel's khugepaged cannot keep a rate, nor a budget for copying.
    bounded = means.rate is not None or means.max_copied is not None
    return None if made == "khugepaged" and means.mechanism == "auto" and bounded else made


def made_by(mechanisms: Mapping[int, Mechanism | None], mechanism: Mechanism) -> list[int]:
    """Return the orders that `mechanism` makes, given the mechanism of each order."""
    return [order for order, by in mechanisms.items() if by == mechanism]


def split_price_of(space: AddressSpace, plan: SpacePlan, means: Means) -> SplitPrice:
    """Return the price of the splits that `plan` needs under `means`."""
    return SplitRanges(plan, made_by(mechanisms_of(space, plan, means), "split")).price(means.min_split_share)


def mechanisms_of(space: AddressSpace, plan: SpacePlan, means: Means) -> dict[int, Mechanism | None]:
    """Return the mechanism of each planned order, the largest order first; None if no requested one can."""
    found: dict[int, Mechanism | None] = {}
    for order in plan.folios_by_order:
        made = mechanism_of(space, order, means)
        if made is None and order == space.geometry.pmd_order:
            # It is planned because the system's switches or the caller want it. `move` alone is refused elsewhere.
            made = "madvise"
        found[order] = made
    return found


def allowed_of(space: AddressSpace, plan: SpacePlan, means: Means) -> Allowed:
    """Return the part of `plan` that a collapse of `space` would carry out now."""
    budget, most_copied, room = bloat_budget(space, means), copy_budget(space, means), room_of(space, means)
    spare, page_size = room.spare, plan.geometry.page_size
    made: dict[int, int] = {}
    left: list[LeftFolios] = []
    filled_bytes = copied_bytes = 0
    mechanisms = mechanisms_of(space, plan, means)
    splits = SplitRanges(plan, made_by(mechanisms, "split"))
    for order, mechanism in mechanisms.items():
        size = plan.geometry.size_of(order)
        wanted = (plan.folios.order == order) & (splits.share >= means.min_split_share)
        # In the order in which a collapse makes them.
        ranked = plan.ranked(plan.folios[wanted])
        if little := plan.folios_by_order[order] - len(ranked):
            left.append(LeftFolios(order, little, LITTLE_PLANNED.format(share=means.min_split_share)))
        if mechanism is None:
            price = price_of_moving(threads(space), means.max_pause_ns)
            left.append(LeftFolios(order, len(ranked), needs_move_reason(price)))
            continue
        if mechanism in ("move", "khugepaged") and not means.fill:
            ranked = ranked[ranked.filled == 0]
            if holes := int(wanted.sum()) - len(ranked):
                left.append(LeftFolios(order, holes, "they have holes: --fill fills them"))
        fill = ranked.filled.astype(np.int64) * page_size
        copied = splits.copied[np.searchsorted(plan.folios.address, ranked.address)] * page_size
        verdicts = _verdicts(
            fill,
            copied,
            budget=None if budget is None else budget - filled_bytes,
            most_copied=None if most_copied is None else most_copied - copied_bytes,
            # The old pages are freed only once the new folio exists.
            room=None if spare is None else spare - filled_bytes - size,
        )
        reasons = {
            _Verdict.BLOAT: f"filling them would add more than --max-bloat {means.max_bloat}",
            _Verdict.COPIED: f"copying them would exceed --max-copied {means.max_copied}",
            _Verdict.ROOM: f"{room.reason}: --reserve",
        }
        for verdict, reason in reasons.items():
            if count := int(np.count_nonzero(verdicts == verdict)):
                left.append(LeftFolios(order, count, reason))
        within = verdicts == _Verdict.MADE
        if count := int(np.count_nonzero(within)):
            made[order] = count
            filled_bytes += int(fill[within].sum())
            copied_bytes += int(copied[within].sum())
    return Allowed(made, filled_bytes, budget, tuple(left))


class _Verdict(enum.IntEnum):
    MADE, BLOAT, COPIED, ROOM = range(4)


def _verdicts(
    fill: NDArray[np.int64],
    copied: NDArray[np.int64],
    *,
    budget: int | None,
    most_copied: int | None,
    room: int | None,
) -> NDArray[np.int8]:
    """Return the verdict on each of some folios made one after another: int8, shape (folios,), `_Verdict`.

    Args:
        fill, copied: int64, shape (folios,), bytes of each.
        budget, most_copied: bytes that may be filled, and copied, in all; None without a bound.
        room: bytes that may be filled before the next folio is begun; None without a bound.
    """
    verdicts = np.zeros(len(fill), np.int8)
    if budget is None and most_copied is None and room is None:
        return verdicts
    bloat_left, copied_left, room_left = (math.inf if bound is None else bound for bound in (budget, most_copied, room))
    for index, (filled, size) in enumerate(zip(fill.tolist(), copied.tolist(), strict=True)):
        if filled > bloat_left:
            verdicts[index] = _Verdict.BLOAT
        elif size > copied_left:
            verdicts[index] = _Verdict.COPIED
        elif room_left < 0:
            verdicts[index] = _Verdict.ROOM
        else:
            bloat_left, copied_left, room_left = bloat_left - filled, copied_left - size, room_left - filled
    return verdicts
