"""Trimming: giving back the pages of large folios that contain only zeroes; the interface, and its outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from mthp.geometry import MIN_ANON_ORDER
from mthp.ptes import Block
from mthp.results import ScanResult

TrimBy = Literal["cold", "split"]
"""The way to trim a folio. ``cold``: MADV_COLD of one page of zeroes splits the whole folio to base pages. ``split``:
only the empty part becomes base pages, and the rest stays large."""


SMALLEST_LARGE = 64 << 10
"""Bytes of the smallest folio that a split leaves of the part in use: arm64 maps it by one TLB entry, and most
processors gain from it."""


@dataclass(frozen=True, slots=True)
class TrimOutcome:
    """The outcome of trimming one folio, as the page tables show it.

    Attributes:
        address, order: address and order of the folio.
        result: SUCCEED if it was split, or why not.
        reason: why not, in words, if there is more to say than the result's meaning.
        given_back: number of its pages that are not resident any more.
        left: number of folios by order in which its memory lies afterwards, base pages as order 0.
        elapsed_ns: duration of the calls in nanoseconds.
        errno: error number of the system call; 0 if it did not fail.
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
    """An address space with large folios that can be trimmed."""

    @property
    def trims_by(self) -> tuple[TrimBy, ...]:
        """The ways to trim folios here, the best first; empty if there is none."""
        ...

    def trim_folios(self, folios: Sequence[Block], zero: Sequence[NDArray[np.bool_]], by: TrimBy) -> list[TrimOutcome]:
        """Give back pages of zeroes of large `folios`, and return the outcomes in their order.

        Parts of a folio may have been unmapped; they are given back as well. A block that no longer lies in one folio
        of that order is left alone. A page that was written to in the meantime stays.

        Args:
            folios: address and order of each.
            zero: the pages of each that contained only zeroes when they were last read: bool, shape (2**order,).

        Raises:
            TargetVanishedError: the process is gone.
            UnsupportedError, NotPermittedError: this way does not work here.
        """
        ...


def in_use(zero: NDArray[np.bool_], page_size: int) -> NDArray[np.int8]:
    """Return the largest aligned folios of a folio that have no empty block of 64 KiB: int8, shape (pages,).

    Args:
        zero: which of its pages contain only zeroes: bool, shape (pages,).
    """
    order = max(MIN_ANON_ORDER, (SMALLEST_LARGE // page_size).bit_length() - 1)
    orders = np.zeros(len(zero), np.int8)
    if len(zero) < 1 << order:
        return orders
    used: NDArray[np.bool_] = np.logical_not(np.logical_and.reduce(zero.reshape(-1, 1 << order), axis=1))
    while True:
        orders[np.repeat(used, 1 << order)] = order
        if len(used) == 1:
            return orders
        used = np.logical_and.reduce(used.reshape(-1, 2), axis=1)
        order += 1


def given_back(zero: NDArray[np.bool_], by: TrimBy, page_size: int) -> NDArray[np.bool_]:
    """Return which pages of a folio a trim gives back: bool, shape (pages,).

    Args:
        zero: which of its pages contain only zeroes: bool, shape (pages,).
    """
    return zero if by == "cold" else zero & (in_use(zero, page_size) == 0)
