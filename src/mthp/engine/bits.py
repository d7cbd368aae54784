"""Operations on the bits, and counts of bits, of all runs of an order.

Arrays have the shape (ranges, runs per range). Each operation has the form that NumPy vectorises.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

PART_ORDER = 6
"""The order of a *part* of a PMD range: a run with packed bits that fill one 64-bit word."""

Bits = NDArray[np.bool_]
Counts = NDArray[np.unsignedinteger]
Repeated = TypeVar("Repeated", np.bool_, np.uint8)


def packed_bits(plane: Bits) -> NDArray[np.uint8]:
    """Return the packed bits of each row."""
    # Rows of whole bytes are packed all at once, which is faster.
    rows = plane if plane.shape[1] < 8 else plane.reshape(1, -1)
    return np.packbits(rows, axis=1, bitorder="little").reshape(len(plane), -1)


_SET_BITS = np.array([byte.bit_count() for byte in range(256)], np.uint8)
"""The set bits of each byte."""


def set_bits(words: NDArray[np.integer]) -> NDArray[np.uint8]:
    """Return the set bits of each word: uint8, of the same shape."""
    # NumPy has bitwise_count from 2.0 on; Debian 12 and Ubuntu 24.04 have 1.24 and 1.26.
    counts: NDArray[np.uint8]
    if hasattr(np, "bitwise_count"):
        counts = np.bitwise_count(words)
    else:
        by_byte = _SET_BITS[np.ascontiguousarray(words).view(np.uint8)]
        counts = by_byte.reshape(*words.shape, words.itemsize).sum(axis=-1, dtype=np.uint8)
    return counts


def nibble_counts(packed: NDArray[np.uint8]) -> Counts:
    """Return the set bits of every half byte, lower half first: uint8, shape (ranges, 2 * bytes)."""
    halves = np.empty((*packed.shape, 2), np.uint8)
    halves[..., 0] = set_bits(packed & 15)
    halves[..., 1] = set_bits(packed >> 4)
    return halves.reshape(packed.shape[0], -1)


def pair_sums(counts: Counts, order: int) -> Counts:
    """Return the sums of neighbouring pairs along each row: the counts of `order`, from those of the order below.

    Strided slices do not vectorise; two bytes read as one 16-bit word do. A byte holds the counts up to order 7.
    """
    if counts.dtype != np.uint8:
        return counts[:, 0::2] + counts[:, 1::2]
    words = counts.view(np.uint16)
    if order > 7:
        return (words & 255) + (words >> 8)
    # The lower byte of the sum is the sum of both bytes, which fits a byte up to order 7.
    sums = words >> 8
    sums += words
    return sums.astype(np.uint8)


def repeated(runs: NDArray[Repeated]) -> NDArray[Repeated]:
    """Return every element of each row twice: the runs of an order, as those of the order below.

    The product of a wide word does it, because ``np.repeat`` is slow for small repeats.
    """
    product = runs.view(np.uint8).astype(np.uint16, order="C")
    product *= 257
    return product.view(runs.dtype)
