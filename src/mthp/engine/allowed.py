"""What of a plan a collapse would do, as its mechanism and its bounds allow at this moment."""

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


def mechanism_of(space: AddressSpace, order: int, means: Means) -> Mechanism | None:
    """Return what makes folios of `order` in `space`, once or in the background; None for nothing that was asked for.

    This is the one place that decides what ``auto`` is.
    """
    made = space.mechanism_for(order, means.mechanism)
    # khugepaged keeps to no rate, and to no budget for copying.
    bounded = means.rate is not None or means.max_copied is not None
    return None if made == "khugepaged" and means.mechanism == "auto" and bounded else made


def made_by(mechanisms: Mapping[int, Mechanism | None], mechanism: Mechanism) -> list[int]:
    """Return the orders that one of the `mechanisms` by order makes."""
    return [order for order, by in mechanisms.items() if by == mechanism]


def split_price_of(space: AddressSpace, plan: SpacePlan, means: Means) -> SplitPrice:
    """Return what splits cost that `plan` takes by `means`."""
    return SplitRanges(plan, made_by(mechanisms_of(space, plan, means), "split")).price(means.min_split_share)


def mechanisms_of(space: AddressSpace, plan: SpacePlan, means: Means) -> dict[int, Mechanism | None]:
    """Return what makes the folios of each planned order, the largest first; None for nothing that was asked for."""
    found: dict[int, Mechanism | None] = {}
    for order in plan.folios_by_order:
        made = mechanism_of(space, order, means)
        if made is None and order == space.geometry.pmd_order:
            # Planned since the system's switches or the caller want it: those who ask for moving only are refused.
            made = "madvise"
        found[order] = made
    return found


def allowed_of(space: AddressSpace, plan: SpacePlan, means: Means) -> Allowed:
    """Return what a collapse of `space` would do now."""
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
        # As a collapse goes.
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
            # The old pages are freed once the new folio is there.
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
    """Return what becomes of folios that are made one after another: int8, shape (folios,).

    Args:
        fill, copied: bytes of each.
        budget, most_copied: bytes that may be filled, and copied, in all; None for no bound.
        room: bytes that may be filled before the next is begun; None for no bound.
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
