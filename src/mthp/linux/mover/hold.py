"""The one part in which moving memory of another process and of this one differ: :class:`Hold`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from mthp.closing import Closing
from mthp.linux.mover.recheck import Before
from mthp.linux.mover.refuse.block import SpecialRanges
from mthp.means import Means
from mthp.movechecks import Refusal
from mthp.ptes import Block
from mthp.results import BlockOutcome


class Hold(Closing):
    """A hold on some blocks that keeps other users away while these blocks are moved.

    Attributes:
        waived: keys of refusals that do not apply to this hold.
        checks_again: whether it notices changes since the check, so that an older list of mappings is good enough.
    """

    waived: frozenset[str] = frozenset()
    checks_again = False

    def admit(self, means: Means, refusals: Sequence[Refusal]) -> None:
        """Do nothing if the blocks can have outcomes under these conditions.

        Raises:
            UnsupportedError: the call itself is refused.
        """

    def too_large(self, order: int) -> range:
        """Return the orders with folios that would fit where one of `order` is wanted."""
        raise NotImplementedError

    def around(self, special: SpecialRanges) -> SpecialRanges:
        """Return `special` plus adjoining memory that may be used until the blocks are held."""
        return special

    def ready(self, order: int) -> AbstractContextManager[object]:
        """Return the context that has to be open while blocks of `order` are moved."""
        del order
        return nullcontext()

    def windows(self, blocks: Sequence[Block], means: Means, before: Before) -> Iterator[list[BlockOutcome]]:
        """Move blocks of one order; yield the outcomes window by window, in any order.

        Args:
            before: the facts that the blocks were checked by.

        Raises:
            LostBytesError: the bytes of a block could not be put back.
            CannotStopError, TargetVanishedError, MthpError: the other blocks are unchanged.
        """
        raise NotImplementedError

    def take_pauses(self) -> list[int]:
        """Return the lengths of the windows since the last call, in nanoseconds; none if no thread is stopped."""
        return []

    def close(self) -> None:
        pass
