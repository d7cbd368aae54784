"""How far a collapse may go, and by what means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from mthp import abilities
from mthp.addrspace import AddressSpace
from mthp.budget import DEFAULT_BLOAT, Amount, Room, as_amount
from mthp.engine.select import PlanOptions
from mthp.errors import UsageError
from mthp.means import DUTY, MAX_PAUSE_NS, Means, Mechanism


@dataclass(frozen=True, slots=True)
class CollapseOptions:
    """How far a collapse may go.

    Attributes:
        plan: what shall be collapsed.
        mechanism: by what means.
        max_bloat: by how much resident memory may grow, in bytes or as a share of what is resident; None for no bound.
        reserve: what must stay free below every memory limit of the target, in bytes or as a share of the limit; None
            for the default (:func:`mthp.budget.kept_free`).
        max_threads: refuse to move memory of a target with more threads; None for what `max_pause` allows
            (:func:`mthp.price.most_threads`).
        rate: bytes collapsed per second, or tried to be; None for as fast as it goes.
        dry_run: plan only.
        max_pause: how long the target may stand still at a time while pages are moved, in seconds.
        pause_share: the part of the time that it may stand still then, above 0, up to 1.
        fill: whether moving may fill holes, as the kernel's call does; without, runs with holes are left as they are.
        verify: compare a hash of the bytes of every moved run before and after, while the target stands still.

    Raises:
        UsageError: a mechanism that does not exist, a number out of range, or what the kernel's call cannot do.
    """

    plan: PlanOptions = field(default_factory=PlanOptions)
    mechanism: Mechanism = "auto"
    max_bloat: Amount | int | None = DEFAULT_BLOAT
    reserve: Amount | int | None = None
    max_threads: int | None = None
    rate: int | None = None
    dry_run: bool = False
    max_pause: float = MAX_PAUSE_NS * 1e-9
    pause_share: float = DUTY
    fill: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        if self.mechanism not in get_args(Mechanism):
            known = ", ".join(get_args(Mechanism))
            raise UsageError(f"unknown mechanism {self.mechanism!r}", help=f"use one of {known}")
        for value in (self.max_bloat, self.reserve):
            as_amount(value)
        if self.max_threads is not None and self.max_threads < 1:
            raise UsageError(f"max_threads is below 1: {self.max_threads}", help="use the number of threads to allow")
        if self.rate is not None and self.rate <= 0:
            raise UsageError(f"a rate of {self.rate} bytes a second is not above 0")
        # Written so that what is no number is refused, too.
        if not 1e-6 <= self.max_pause <= 60:
            raise UsageError(f"a pause of {self.max_pause:g} s is not within 1us and 60s", help="the default is 1ms")
        if not 0 < self.pause_share <= 1:
            message = f"a pause_share of {self.pause_share:g} is not above 0 and at most 1"
            raise UsageError(message, help=f"the default is {DUTY:g}")
        if self.mechanism == "khugepaged" and (self.rate is not None or self.verify):
            raise UsageError(
                "the kernel's khugepaged keeps to no rate, and verifies nothing",
                help="leave these out, or use another mechanism",
            )
        if self.mechanism == "khugepaged" and self.fill and self.max_bloat is not None:
            raise UsageError(
                "the kernel's khugepaged cannot keep to a bloat budget when it fills holes",
                help="leave fill out, or lift the budget: max-bloat none",
            )
        for name in ("fill", "verify"):
            if getattr(self, name) and self.mechanism in ("auto", "madvise"):
                raise UsageError(
                    f"{name} is for the mover: MADV_COLLAPSE always fills, and cannot verify",
                    help="use the mechanism move, or madvise,move",
                )

    @property
    def means(self) -> Means:
        """What of this concerns the backend."""
        return Means(
            self.mechanism,
            int(self.max_pause * 1e9),
            self.pause_share,
            self.fill,
            self.verify,
            reserve=as_amount(self.reserve),
            max_threads=self.max_threads,
        )

    def bloat_budget(self, space: AddressSpace) -> int | None:
        """Return the bytes that filling may add to `space` as it is now; None for no bound.

        Raises:
            TargetVanishedError: the process is gone.
        """
        bloat = as_amount(self.max_bloat)
        if bloat is None or bloat.share is None:
            return None if bloat is None else bloat.size
        return bloat.of(abilities.resident_bytes(space))

    def room(self, space: AddressSpace) -> Room:
        """Return what fits below the memory limits of `space`.

        Raises:
            TargetVanishedError: the process is gone.
        """
        return Room(lambda: abilities.memory_bounds(space), as_amount(self.reserve))
