"""Giving back the pages of large folios that hold nothing but zeroes: what a backend does, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mthp.ptes import Block
from mthp.results import ScanResult

TrimBy = Literal["cold", "split"]
"""How a folio is trimmed. ``cold``: MADV_COLD of one page of zeroes splits all of it to base pages. ``split``: only
what is empty becomes base pages, and the rest stays large."""


@dataclass(frozen=True, slots=True)
class TrimOutcome:
    """What came of trimming one folio, as the page tables show it.

    Attributes:
        address, order: of the folio.
        result: SUCCEED if it was split, or why not.
        reason: why not, for a person, where there is more to say than the result's meaning.
        given_back: pages of it that are not resident any more.
        left: how many folios of which order its memory lies in afterwards, base pages as order 0.
        elapsed_ns: time that the calls took, in nanoseconds.
        errno: the system's error number where there was one, else 0.
    """

    address: int
    order: int
    result: ScanResult
    reason: str = ""
    given_back: int = 0
    left: Mapping[int, int] = field(default_factory=dict)
    elapsed_ns: int = 0
    errno: int = 0


@runtime_checkable
class Trimming(Protocol):
    """An address space whose large folios can be trimmed."""

    @property
    def trims_by(self) -> tuple[TrimBy, ...]:
        """How folios can be trimmed here, the better way first; empty if not at all."""
        ...

    def trim_folios(self, folios: Sequence[Block], zero: Sequence[NDArray[np.bool_]], by: TrimBy) -> list[TrimOutcome]:
        """Give back pages of zeroes of large `folios`: the outcome of each, in their order.

        Parts of a folio may have been unmapped; they are given back as well. What does not lie in one folio of that
        order any more is left alone. A page that was written to meanwhile stays as it is.

        Args:
            folios: the address at which each is mapped, and its order.
            zero: which pages of each held nothing but zeroes when they were last read: bool, shape (2**order,).

        Raises:
            TargetVanishedError: the process is gone.
            UnsupportedError, NotPermittedError: not in this way here.
        """
        ...
