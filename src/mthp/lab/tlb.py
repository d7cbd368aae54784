"""How often a trace of accesses misses the TLB: the levels of named processors, set by set, with LRU replacement.

A TLB entry maps one page of a size that the processor knows, or a run of PTEs that it *coalesces* into one: an aligned
run whose frames follow each other, which every large folio is. So the translations of an access depend on how its
memory is mapped: a PMD entry, or PTEs of a folio of some order.

*LRU without a loop over accesses.* An access hits an LRU set of w ways exactly if fewer than w other pages were used in
that set since the last access to its page (the stack distance; Mattson et al., 1970). A page is used for the first time
since then where its own previous access lies before that. So with prev[t] the previous access to the page of access
t, the distance of t is the number of accesses j between prev[t] and t with prev[j] < prev[t]; and as every access up
to prev[t] has an earlier prev than prev[t], that is the number of all j before t with prev[j] <= prev[t], less
prev[t] + 1.
Counting how many values to the left are smaller is done for all accesses at once, by merging sorted blocks. Sets only
have to lie one after another.

*Sources.* Every processor names the documents that its figures are from, by title and number, and says where one is
assumed. That Zen 4 has 72 and 3 072 entries is also what its CPUID says (leaves 8000_0005h and 8000_0006h).

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
"""Accesses simulated at a time."""

_SMALL = 64
"""Values to the left are compared one by one within blocks of this size; larger blocks are merged."""


@dataclass(frozen=True, slots=True)
class Structure:
    """One array of TLB entries.

    Attributes:
        entries: how many.
        ways: of each set; as many as there are entries if it is fully associative.
        largest: bytes of the largest page that an entry maps.
    """

    entries: int
    ways: int
    largest: int

    @property
    def sets(self) -> int:
        """How many sets, a power of two."""
        return self.entries // self.ways


@dataclass(frozen=True, slots=True)
class Processor:
    """The data TLB of one processor.

    Attributes:
        name: what to call it on the command line.
        title: what it is.
        source: where its figures are from, and what is assumed.
        levels: the first level first; each is one structure or several, ordered by the sizes that they hold.
        coalesced: for sizes of base pages the bytes of the largest run of PTEs that one entry holds; with others
            nothing is coalesced.
    """

    JSON: ClassVar = "name source"

    name: str
    title: str
    source: str
    levels: tuple[tuple[Structure, ...], ...]
    coalesced: tuple[tuple[int, int], ...] = ()

    @classmethod
    def named(cls, name: str) -> Processor:
        """The processor of that name.

        Raises:
            UsageError: there is none.
        """
        if name not in PROCESSORS:
            raise UsageError(f"unknown processor {name!r}", help=f"use {', '.join(PROCESSORS)}")
        return PROCESSORS[name]

    @property
    def last_level_entries(self) -> int:
        """Entries of the last level that hold base pages."""
        return self.levels[-1][0].entries

    def coalesced_order(self, page_size: int) -> int:
        """Order of the largest run of PTEs that one entry holds."""
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
        " Processor Programming Reference for AMD Family 17h Models 01h,08h (54945), PMCx045, whose third size of page"
        " is 32K; that runs of 16 KiB are coalesced too is assumed.",
        ((Structure(64, 64, _GB),), (Structure(1536, 12, 2 * _MB),)),
        coalesced=((4 * _KB, 32 * _KB),),
    ),
    Processor(
        "zen4",
        "AMD Zen 4 (of family 19h)",
        "Software Optimization Guide for the AMD Zen4 Microarchitecture (57647), Memory Address Translation. Runs of 16"
        " KiB: there, and in the description of PMCx045: a coalesced page is made of four adjacent 4 KiB pages.",
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


@dataclass(frozen=True, slots=True)
class TlbCounts:
    """What a trace did to a TLB.

    Attributes:
        accesses: in the trace.
        misses: of each level; those of the last are page walks.
    """

    accesses: int
    misses: tuple[int, ...]

    @property
    def walks(self) -> int:
        """Page walks."""
        return self.misses[-1]


class Tlb:
    """The data TLB of a processor, empty at first. Its contents stay from one call to the next.

    Args:
        processor: which.
        page_size: of the base pages, in bytes.
    """

    def __init__(self, processor: Processor, page_size: int) -> None:
        self.processor = processor
        self._page_size = page_size
        self._arrays = [[_LruArray(each) for each in level] for level in processor.levels]
        self._accesses = 0
        self._misses = [0] * len(processor.levels)

    @property
    def counts(self) -> TlbCounts:
        """What it has seen so far."""
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
        for start in range(0, len(pages), CHUNK):
            self._chunk(pages[start : start + CHUNK], entry[start : start + CHUNK])

    def _chunk(self, pages: NDArray[np.int64], order: NDArray[np.int64]) -> None:
        for index, arrays in enumerate(self._arrays):
            sizes = [array.structure.largest for array in arrays]
            largest = (np.array(sizes, np.int64) // self._page_size).astype(np.float64)
            limits = np.log2(largest).astype(np.int64)
            # A page larger than any entry is held in pieces of the largest size.
            order_here = np.minimum(order, limits[-1])
            which = np.searchsorted(limits, order_here)
            missed: NDArray[np.bool_] = np.zeros(len(pages), np.bool_)
            for number, array in enumerate(arrays):
                chosen = np.flatnonzero(which == number)
                if len(chosen):
                    missed[chosen] = array.access(pages[chosen] >> order_here[chosen], order_here[chosen])
            self._misses[index] += int(np.count_nonzero(missed))
            pages, order = pages[missed], order[missed]


class _LruArray:
    """One structure and what is in it."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self._contents: NDArray[np.int64] = np.empty(0, np.int64)

    def access(self, numbers: NDArray[np.int64], orders: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Look up pages of some sizes, one after another, and load what is missing.

        Args:
            numbers: int64, shape (accesses,): page numbers in units of their size.
            orders: int64, the same shape: their sizes, so that pages of two sizes are two pages.

        Returns:
            bool, shape (accesses,): which of them missed.
        """
        # The set is found by the lowest bits, so the size goes into the highest: orders are below 32.
        tags = np.concatenate([self._contents, orders << 57 | numbers])
        missed = lru_misses(tags, self.structure.sets, self.structure.ways)
        held = len(self._contents)
        self._contents = _most_recent(tags, self.structure.sets, self.structure.ways)
        return missed[held:]


def lru_misses(tags: NDArray[np.int64], sets: int, ways: int) -> NDArray[np.bool_]:
    """Which accesses miss in an LRU array that is empty at first.

    Args:
        tags: int64, shape (accesses,): what is accessed; the lowest bits choose the set.
        sets: a power of two.
        ways: entries of a set.

    Returns:
        bool, shape (accesses,).
    """
    order = np.argsort(tags & (sets - 1), kind="stable")
    grouped = tags[order]
    # What is accessed again at once hits, and changes nothing.
    fresh = np.ones(len(tags), np.bool_)
    fresh[1:] = grouped[1:] != grouped[:-1]
    missed: NDArray[np.bool_] = np.zeros(len(tags), np.bool_)
    missed[order[fresh]] = _distances(_previous(grouped[fresh])) >= ways
    return missed


def _previous(tags: NDArray[np.int64]) -> NDArray[np.int64]:
    """The index of the previous access to the same tag; -1 for the first: int64, shape (accesses,)."""
    order = np.argsort(tags, kind="stable")
    same = tags[order[1:]] == tags[order[:-1]]
    previous = np.full(len(tags), -1, np.int64)
    previous[order[1:][same]] = order[:-1][same]
    return previous


_FAR = np.iinfo(np.int64).max


def _distances(previous: NDArray[np.int64]) -> NDArray[np.int64]:
    """The stack distance of every access: the other tags since its previous access; huge for the first of a tag."""
    distances = _smaller_to_the_left(previous) - (previous + 1)
    distances[previous < 0] = _FAR
    return distances


def _smaller_to_the_left(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each value how many before it are not larger: int64, shape (values,)."""
    count = len(values)
    size = _SMALL
    blocks = -(-max(count, 1) // size)
    while blocks & (blocks - 1):
        blocks += 1
    # What is added behind is larger than everything, and so counts nowhere.
    padded = np.full(blocks * size, count, np.int64)
    padded[:count] = values
    counts = _within_small_blocks(padded.reshape(blocks, size))
    order = np.argsort(padded.reshape(blocks, size), axis=1, kind="stable") + np.arange(0, blocks * size, size)[:, None]
    while blocks > 1:
        blocks //= 2
        pairs = order.reshape(blocks, 2, size)
        offsets = (np.arange(blocks) * (count + 2))[:, None]
        left = (padded[pairs[:, 0]] + offsets).ravel()
        right = (padded[pairs[:, 1]] + offsets).ravel()
        found = np.searchsorted(left, right, side="right") - np.repeat(np.arange(blocks) * size, size)
        counts[pairs[:, 1].ravel()] += found
        size *= 2
        order = order.reshape(blocks, size)
        # Both halves are sorted, which a stable sort makes use of.
        order = np.take_along_axis(order, np.argsort(padded[order], axis=1, kind="stable"), axis=1)
    return counts[:count]


def _within_small_blocks(blocks: NDArray[np.int64]) -> NDArray[np.int64]:
    """For each value how many before it in its block are not larger: int64, shape (values,)."""
    counts = np.zeros(blocks.shape, np.int64)
    for distance in range(1, blocks.shape[1]):
        counts[:, distance:] += blocks[:, :-distance] <= blocks[:, distance:]
    return counts.ravel()


def _most_recent(tags: NDArray[np.int64], sets: int, ways: int) -> NDArray[np.int64]:
    """The tags that an LRU array holds in the end, the least recently used first: int64, shape (entries held,)."""
    unique, last = np.unique(tags[::-1], return_index=True)
    # Most recent first, set by set; the first `ways` of each set are there.
    order = np.lexsort((last, unique & (sets - 1)))
    chosen = unique[order] & (sets - 1)
    first_of_set = np.searchsorted(chosen, chosen, side="left")
    kept = order[np.arange(len(order)) - first_of_set < ways]
    return unique[kept[np.argsort(-last[kept], kind="stable")]]
