"""The memory that a collapse may add to a target, and the memory that it must leave free.

There are two bounds, for two dangers:

- The *bloat budget* bounds what filling holes adds to the target: by default a tenth of its resident memory.
- The *reserve* must stay free below every limit that new memory of the target counts against: those of its memory
  cgroup and of all cgroups above, and the machine's memory. A collapse that took it would leave the target to the OOM
  killer as soon as it grows. No budget lifts it.

Both are read again during a collapse (:class:`Room`), because the target and its neighbours grow meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mthp.errors import UsageError
from mthp.units import format_size, parse_share_or_size

MACHINE = "the machine"
"""Name of the bound that is the machine's memory."""

RESERVE_SHARE = 0.1
RESERVE_LEAST = 64 << 20
RESERVE_MOST = 1 << 30
"""The default reserve: a tenth of the limit, in bytes at least 64M and at most 1G.

A tenth, because programs grow in proportion to their memory. At least 64M, because one malloc arena of glibc, a thread
pool or a garbage collector's next step takes tens of megabytes however small the container is. At most 1G, because the
growth between two readings must fit, which are a batch (0.1 s) apart: one processor clears some gigabytes a second. A
tenth of a large machine would deny every large folio to a database that fills it.
"""


@dataclass(frozen=True, slots=True)
class Amount:
    """A size, or a share of an amount that is measured later.

    Attributes:
        share: of 1; None if `size` is set.
        size: in bytes; None if `share` is set.

    Raises:
        UsageError: the amount is below 0.
    """

    share: float | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        # The condition is negated so that NaN is refused, too.
        if not (self.share or 0.0) >= 0 or (self.size or 0) < 0:
            raise UsageError(f"an amount is below 0: {self}", help="use 0 or more")

    def of(self, whole: int) -> int:
        """Return the amount in bytes; a share is of `whole` bytes."""
        return self.size if self.size is not None else int((self.share or 0.0) * whole)

    def __str__(self) -> str:
        return format_size(self.size) if self.size is not None else f"{100 * (self.share or 0.0):g}%"


AnyAmount = Amount | int | str | None
"""What :func:`as_amount` takes."""


def as_amount(value: AnyAmount) -> Amount | None:
    """Return `value` as an amount; a number is in bytes, a text as :func:`parse_amount` reads it.

    Raises:
        UsageError: `value` is below 0, or not an amount.
    """
    if value is None or isinstance(value, Amount):
        return value
    return Amount(size=value) if isinstance(value, int) else parse_amount(value)


DEFAULT_BLOAT = Amount(share=0.1)
"""The default bloat budget, a share of the resident bytes: programs vary by about this much from day to day."""


def parse_amount(value: object) -> Amount:
    """Return the amount that ``5%``, ``0.05`` or ``64M`` means.

    Raises:
        UsageError: `value` is neither a share nor a size.
    """
    return Amount(*parse_share_or_size(value))


def parse_bloat(value: object) -> Amount | None:
    """Return a bloat budget: an amount, or None for ``none``, which means no bound.

    Raises:
        UsageError: as :func:`parse_amount`.
    """
    return None if value == "none" else parse_amount(value)


@dataclass(frozen=True, slots=True)
class MemoryBound:
    """A limit that new memory of a target counts against.

    Attributes:
        name: `MACHINE`, or the directory of a memory cgroup.
        limit: bytes.
        left: bytes that are unused, or that the kernel frees before it kills a process: clean file cache.
    """

    name: str
    limit: int
    left: int


def kept_free(limit: int, reserve: Amount | None = None) -> int:
    """Return the bytes that must stay free below `limit`.

    Args:
        reserve: the user's reserve; None for the default.
    """
    if reserve is not None:
        return reserve.of(limit)
    return min(max(int(RESERVE_SHARE * limit), RESERVE_LEAST), RESERVE_MOST)


class Room:
    """The room for new memory of a target below all of its limits, less the reserve.

    Args:
        bounds: returns the present limits.
        reserve: what must stay free below each; None for the default.

    Attributes:
        limited: whether a cgroup limits the target, not only the machine.
    """

    def __init__(self, bounds: Callable[[], Sequence[MemoryBound]], reserve: Amount | None = None) -> None:
        self._bounds, self._reserve = bounds, reserve
        self._spare: int | None = None
        self._tightest: MemoryBound | None = None
        self._taken = 0
        self.limited = False
        self.renew()

    def renew(self) -> None:
        """Read the limits again, which now include what was taken before."""
        bounds = self._bounds()
        # The bound with the least room decides, which need not be the lowest limit.
        spare = [(bound.left - kept_free(bound.limit, self._reserve), bound) for bound in bounds]
        self._spare, self._tightest = min(spare, key=lambda each: each[0], default=(None, None))
        self._taken = 0
        self.limited = any(bound.name != MACHINE for bound in bounds)

    @property
    def spare(self) -> int | None:
        """Bytes that still fit, not below 0; None without a limit."""
        return None if self._spare is None else max(0, self._spare - self._taken)

    def take(self, added: int, at_once: int = 0) -> bool:
        """Take room for an operation if it fits; return whether it does.

        Args:
            added: bytes that stay charged after the operation.
            at_once: bytes that it charges before it frees any.
        """
        if self._spare is not None and self._taken + max(added, at_once) > self._spare:
            return False
        # What an operation frees again is not counted as taken: the next one may use it.
        self._taken += added
        return True

    @property
    def of_machine(self) -> bool:
        """Whether the machine's memory is the tightest limit."""
        return self._tightest is not None and self._tightest.name == MACHINE

    @property
    def reason(self) -> str:
        """The reason why something does not fit, as a sentence without a full stop; ``""`` without a limit."""
        bound = self._tightest
        if bound is None:
            return ""
        kept = format_size(kept_free(bound.limit, self._reserve))
        left = f"{format_size(max(0, bound.left))} of {format_size(bound.limit)}"
        return f"{left} are left in {bound.name}, and {kept} of it must stay free"
