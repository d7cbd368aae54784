"""TLB misses of a trace of accesses: the levels of named processors, set by set, with LRU replacement.

A TLB entry maps one page of a size that the processor knows, or a run of PTEs that it *coalesces*: an aligned run with
contiguous frames, which every large folio has. So the translations of an access depend on how its memory is mapped: by
a PMD entry, or by PTEs of a folio of some order.

Every processor names the documents of its figures, by title and number, and marks assumptions.

Simplifications: true LRU (processors approximate it), data accesses of one thread only, no prefetching of
translations, no sharing with instructions or page directory entries, and a walk fills all levels. A folio smaller than
the largest run that a processor coalesces takes one entry, and all levels coalesce alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from mthp.errors import UsageError

_KB, _MB, _GB = 1 << 10, 1 << 20, 1 << 30

CHUNK = 1 << 20
"""Accesses to simulate at a time."""

_SMALL = 64
"""Block size up to which values to the left are compared one by one; larger blocks are merged."""


@dataclass(frozen=True, slots=True)
class Structure:
    """One array of TLB entries.

    Attributes:
        entries: number of entries.
        ways: ways of each set; equal to `entries` if the array is fully associative.
        largest: bytes of the largest page that an entry maps.
    """

    entries: int
    ways: int
    largest: int

    @property
    def sets(self) -> int:
        """The number of sets, a power of two."""
        return self.entries // self.ways


@dataclass(frozen=True, slots=True)
class Processor:
    """The data TLB of one processor.

    Attributes:
        name: name on the command line.
        title: name of the product.
        source: the sources of its figures, and the assumptions.
        levels: the first level first; each is one or several structures, by the largest size that they hold.
        coalesced: pairs of a base page size and the bytes of the largest run of PTEs in one entry; other sizes are not
            coalesced.
    """

    JSON: ClassVar = "name source"

    name: str
    title: str
    source: str
    levels: tuple[tuple[Structure, ...], ...]
    coalesced: tuple[tuple[int, int], ...] = ()

    @classmethod
    def named(cls, name: str) -> Processor:
        """Return the processor of that name.

        Raises:
            UsageError: no processor has that name.
        """
        if name not in PROCESSORS:
            raise UsageError(f"unknown processor {name!r}", help=f"use {', '.join(PROCESSORS)}")
        return PROCESSORS[name]

    @property
    def last_level_entries(self) -> int:
        """Number of entries of the last level that hold base pages."""
        return self.levels[-1][0].entries

    def coalesced_order(self, page_size: int) -> int:
        """Return the order of the largest run of PTEs in one entry."""
        return (dict(self.coalesced).get(page_size, page_size) // page_size).bit_length() - 1


_ALL = (
    Processor(
        "skylake",
        "Intel Skylake and Cascade Lake",
        "Intel 64 and IA-32 Architectures Optimization Reference Manual (248966-045), table 2-15, TLB Parameters of the"
        " Skylake Client Microarchitecture. The few entries for 1 GiB pages are left out.",
        ((Structure(64, 4, 4 * _KB), Structure(32, 4, 4 * _MB)), (Structure(1536, 12, 4 * _MB),)),
    ),
    Processor(
        "zen",
        "AMD Zen (family 17h, models 00h to 2Fh)",
        "Software Optimization Guide for AMD Family 17h Processors (55723), Memory Address Translation. Runs of 32 KiB:"
        " Processor Programming Reference for AMD Family 17h Models 01h,08h (54945), PMCx045, with 32K as its third"
        " size of page; that runs of 16 KiB are coalesced too is assumed.",
        ((Structure(64, 64, _GB),), (Structure(1536, 12, 2 * _MB),)),
        coalesced=((4 * _KB, 32 * _KB),),
    ),
    Processor(
        "zen4",
        "AMD Zen 4 (of family 19h)",
        "Software Optimization Guide for the AMD Zen4 Microarchitecture (57647), Memory Address Translation. Runs of 16"
        " KiB: there, and in the description of PMCx045: a coalesced page is made of four adjacent 4 KiB pages.",
        # Also in its CPUID: leaves 8000_0005h and 8000_0006h.
        ((Structure(72, 72, _GB),), (Structure(3072, 24, 2 * _MB),)),
        coalesced=((4 * _KB, 16 * _KB),),
    ),
    Processor(
        "neoverse-n1",
        "Arm Cortex-A76 and Neoverse N1, with the contiguous bit that Linux sets on whole runs",
        "Arm Cortex-A76 Core Technical Reference Manual (100798), A5.2 TLB organization; Neoverse N1 is derived from it"
        " and assumed to be the same. Runs: Arm Architecture Reference Manual for A-profile (DDI 0487), the Contiguous"
        " bit: 16 entries of 4 KiB, 128 of 16 KiB, 32 of 64 KiB.",
        ((Structure(48, 48, 512 * _MB),), (Structure(1280, 5, _GB),)),
        coalesced=((4 * _KB, 64 * _KB), (16 * _KB, 2 * _MB), (64 * _KB, 2 * _MB)),
    ),
)

PROCESSORS: dict[str, Processor] = {processor.name: processor for processor in _ALL}
"""The processors, by name."""


def known_processor(name: str) -> str:
    """Return `name` if it is that of a processor.

    Raises:
        UsageError: no processor has that name.
    """
    return Processor.named(name).name


@dataclass(frozen=True, slots=True)
class TlbCounts:
    """The counts of a trace on a TLB.

    Attributes:
        accesses: accesses of the trace.
        misses: misses of each level; those of the last are page walks.
    """

    accesses: int
    misses: tuple[int, ...]

    @property
    def walks(self) -> int:
        """Number of page walks."""
        return self.misses[-1]


class Tlb:
    """The data TLB of a processor, empty at first. It keeps its contents between calls.

    Args:
        processor: the processor.
        page_size: bytes of a base page.
        chunk: accesses to simulate at a time.
    """

    def __init__(self, processor: Processor, page_size: int, chunk: int = CHUNK) -> None:
        self.processor = processor
        self._chunk_accesses = chunk
        self._page_size = page_size
        self._arrays = [[_LruArray(each) for each in level] for level in processor.levels]
        self._accesses = 0
        self._misses = [0] * len(processor.levels)

    @property
    def counts(self) -> TlbCounts:
        """The counts of all accesses so far."""
        return TlbCounts(self._accesses, tuple(self._misses))

    def access(self, pages: NDArray[np.int64], orders: NDArray[np.int8], pmd_mapped: NDArray[np.bool_]) -> None:
        """Access some pages, one after another.

        Args:
            pages: int64, shape (accesses,): page numbers.
            orders: int8, the same shape: the order of the folio that the page lies in.
            pmd_mapped: bool, the same shape: a PMD entry maps the whole folio.
        """
        limit = self.processor.coalesced_order(self._page_size)
        entry = np.where(pmd_mapped, orders, np.clip(orders, 0, limit)).astype(np.int64)
        self._accesses += len(pages)
        for start in range(0, len(pages), self._chunk_accesses):
            end = start + self._chunk_accesses
            self._chunk(pages[start:end], entry[start:end])

    def _chunk(self, pages: NDArray[np.int64], order: NDArray[np.int64]) -> None:
        for index, arrays in enumerate(self._arrays):
            sizes = [array.structure.largest for array in arrays]
            largest = (np.array(sizes, np.int64) // self._page_size).astype(np.float64)
            limits = np.log2(largest).astype(np.int64)
            # A page larger than any entry takes several entries of the largest size.
            order_here = np.minimum(order, limits[-1])
            # The smallest structure that holds pages of this size.
            which = np.searchsorted(limits, order_here)
            missed: NDArray[np.bool_] = np.zeros(len(pages), np.bool_)
            for number, array in enumerate(arrays):
                chosen = np.flatnonzero(which == number)
                if len(chosen):
                    missed[chosen] = array.access(pages[chosen] >> order_here[chosen], order_here[chosen])
            self._misses[index] += int(np.count_nonzero(missed))
            # The next level sees only the misses of this one.
            pages, order = pages[missed], order[missed]


class _LruArray:
    """One structure and its contents."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self._contents: NDArray[np.int64] = np.empty(0, np.int64)

    def access(self, numbers: NDArray[np.int64], orders: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Look up pages of some sizes, one after another, and load the missing ones.

        Args:
            numbers: int64, shape (accesses,): page numbers in units of their size.
            orders: int64, the same shape: their sizes, so that pages of two sizes are two pages.

        Returns:
            bool, shape (accesses,): which of them missed.
        """
        # The set is found by the lowest bits, so the size goes into the highest: orders are below 32. Accesses to the
        # entries held so far, oldest first, rebuild the state of the array.
        tags = np.concatenate([self._contents, orders << 57 | numbers])
        missed = lru_misses(tags, self.structure.sets, self.structure.ways)
        held = len(self._contents)
        self._contents = _most_recent(tags, self.structure.sets, self.structure.ways)
        return missed[held:]


def lru_misses(tags: NDArray[np.int64], sets: int, ways: int) -> NDArray[np.bool_]:
    """Return which accesses miss in an LRU array that is empty at first.

    Args:
        tags: int64, shape (accesses,): tags of the accesses; the lowest bits select the set.
        sets: number of sets, a power of two.
        ways: entries of a set.

    Returns:
        bool, shape (accesses,).
    """
    # Stable, because the order of accesses within a set must stay.
    order = np.argsort(tags & (sets - 1), kind="stable")
    grouped = tags[order]
    # A repeated access hits, and changes nothing.
    fresh = np.ones(len(tags), np.bool_)
    fresh[1:] = grouped[1:] != grouped[:-1]
    missed: NDArray[np.bool_] = np.zeros(len(tags), np.bool_)
    # An access hits a set of w ways exactly if fewer than w other pages were used in it since the last access to its
    # page (the stack distance; Mattson et al., 1970). A page is in one set only, so sets may lie one after another.
    missed[order[fresh]] = _distances(_previous(grouped[fresh])) >= ways
    return missed


def _previous(tags: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the index of the previous access to the same tag; -1 for the first: int64, shape (accesses,)."""
    order = np.argsort(tags, kind="stable")
    same = tags[order[1:]] == tags[order[:-1]]
    previous = np.full(len(tags), -1, np.int64)
    previous[order[1:][same]] = order[:-1][same]
    return previous


_FAR = np.iinfo(np.int64).max


def _distances(previous: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the stack distance of each access: the other tags since its previous one; huge for a tag's first."""
    # An access is the first to its page since prev[t] if its own previous access lies before prev[t]. So the distance
    # of t is the number of accesses j between prev[t] and t with prev[j] < prev[t]. Every access up to prev[t] has an
    # earlier prev than prev[t], so that is the number of all j before t with prev[j] <= prev[t], less prev[t] + 1.
    distances = _smaller_to_the_left(previous) - (previous + 1)
    distances[previous < 0] = _FAR
    return distances


def _smaller_to_the_left(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each value the number of values before it that are not larger: int64, shape (values,)."""
    count = len(values)
    size = _SMALL
    blocks = -(-max(count, 1) // size)
    # A power of two, because blocks are merged in pairs.
    while blocks & (blocks - 1):
        blocks += 1
    # The padding is larger than all values, so it does not count.
    padded = np.full(blocks * size, count, np.int64)
    padded[:count] = values
    counts = _within_small_blocks(padded.reshape(blocks, size))
    order = np.argsort(padded.reshape(blocks, size), axis=1, kind="stable") + np.arange(0, blocks * size, size)[:, None]
    while blocks > 1:
        blocks //= 2
        pairs = order.reshape(blocks, 2, size)
        # All pairs are searched at once. An offset larger than any value keeps one pair's values below the next pair's.
        offsets = (np.arange(blocks) * (count + 2))[:, None]
        left = (padded[pairs[:, 0]] + offsets).ravel()
        right = (padded[pairs[:, 1]] + offsets).ravel()
        found = np.searchsorted(left, right, side="right") - np.repeat(np.arange(blocks) * size, size)
        counts[pairs[:, 1].ravel()] += found
        size *= 2
        order = order.reshape(blocks, size)
        # Both halves are sorted, which makes a stable sort fast.
        order = np.take_along_axis(order, np.argsort(padded[order], axis=1, kind="stable"), axis=1)
    return counts[:count]


def _within_small_blocks(blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return for each value the number of values before it in its block that are not larger: int64, shape (values,)."""
    counts = np.zeros(blocks.shape, np.int64)
    for distance in range(1, blocks.shape[1]):
        counts[:, distance:] += blocks[:, :-distance] <= blocks[:, distance:]
    return counts.ravel()


def _most_recent(tags: NDArray[np.int64], sets: int, ways: int) -> NDArray[np.int64]:
    """Return the tags in an LRU array at the end, the least recently used first: int64, shape (entries held,)."""
    # The first index of the reversed tags is the last access.
    unique, last = np.unique(tags[::-1], return_index=True)
    # Most recent first, set by set; the array holds the first `ways` of each set.
    order = np.lexsort((last, unique & (sets - 1)))
    chosen = unique[order] & (sets - 1)
    first_of_set = np.searchsorted(chosen, chosen, side="left")
    kept = order[np.arange(len(order)) - first_of_set < ways]
    return unique[kept[np.argsort(-last[kept], kind="stable")]]
