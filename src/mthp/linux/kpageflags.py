"""Read ``/proc/kpageflags``: from page frame numbers to flags and folio orders, in few and large reads.

The file is an array with one 64-bit word for every page frame of the machine. The order of a folio is not a field of
the word: a folio is a head followed by its tails. So frames are read in *chunks* of 2**shift frames, naturally aligned,
in which smaller folios lie whole. A folio that fills its chunk may be larger than it: its frames are *open*, and are
looked up again with larger chunks, of a PMD range at most; frames still open then are followed page by page.

Pages move while they are read: a frame may have been freed and used again since pagemap named it. Then the word belongs
to the new owner. This module cannot detect that; callers check again before they act on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mthp.linux import abi
from mthp.linux.framewords import PORTION_FRAMES, SECONDS_PER_CALL, SECONDS_PER_WORD, Frames, FrameWords, Words
from mthp.ptes import ORDER_UNKNOWN, Pte

KPAGEFLAGS = "/proc/kpageflags"

_LARGEST_TABLE = 1 << 24
_SMALLER_SHIFTS = (9, 3)
_LARGEST_ORDER = 24

_SECONDS_PER_DIVISION = 10e-9
"""Seconds for dividing the chunks, per frame wanted."""

_SAMPLE = 64
"""Frames that are read to see whether memory has folios; if they show none, it has few."""

_OPEN = -3
"""Value in an array of orders: the folio fills its chunk, and may be larger."""

_HEAD = np.uint64(abi.KPF_COMPOUND_HEAD)
_TAIL = np.uint64(abi.KPF_COMPOUND_TAIL)
_ANON_MEMBER = np.uint64(abi.KPF_ANON | abi.KPF_SWAPBACKED | abi.KPF_COMPOUND_TAIL)
_LAZYFREE_MASK = np.uint64(abi.KPF_ANON | abi.KPF_SWAPBACKED | abi.KPF_HUGE | abi.KPF_KSM)

_Orders = NDArray[np.int8]


@dataclass(frozen=True, slots=True)
class _Chunks:
    """Chunks that contain the wanted frames.

    Attributes:
        shift: binary logarithm of the frames in a chunk.
        ids: frame number >> shift of each chunk, ascending: int64, shape (chunks,).
        index: for each frame wanted, the position of its chunk in `ids`: int64, shape (frames,).
    """

    shift: int
    ids: Frames
    index: Frames

    @property
    def words(self) -> int:
        return len(self.ids) << self.shift

    def seconds(self) -> float:
        """Return the estimated time to read them, in seconds."""
        return self.words * SECONDS_PER_WORD + len(_runs(self.ids)[0]) * SECONDS_PER_CALL

    def closed(self) -> _Chunks:
        """Return these and the chunks between any two if it is faster to read them than to make a new call."""
        between = np.diff(self.ids, append=self.ids[-1:] + 1) - 1
        between[(between << self.shift) * SECONDS_PER_WORD > SECONDS_PER_CALL] = 0
        if not between.any():
            return self
        before = np.cumsum(between) - between
        place = np.arange(len(self.ids)) + before
        # Each chunk, followed by the chunks of the gap behind it.
        ids = np.arange(place[-1] + 1) + np.repeat(self.ids - place, between + 1)
        return _Chunks(self.shift, ids, place[self.index])

    def divided(self, frames: Frames, shift: int) -> _Chunks:
        """Return the same frames in smaller chunks of 2**shift frames."""
        bits = self.shift - shift
        # Number the small chunks within the chosen large ones only, so that the table stays small.
        distinct, index = _distinct(self.index << bits | frames >> shift & (1 << bits) - 1)
        return _Chunks(shift, self.ids[distinct >> bits] << bits | distinct & (1 << bits) - 1, index)


class FolioReader(FrameWords):
    """A reader of ``/proc/kpageflags``. Several threads may use one at once.

    Args:
        pmd_order: PMD order of the machine; the size of the largest chunk.

    Raises:
        OSError: it cannot be opened: it takes root and CAP_SYS_ADMIN.
    """

    def __init__(self, pmd_order: int, path: str = KPAGEFLAGS) -> None:
        super().__init__(path)
        self._top = pmd_order
        self._shifts = (pmd_order, *(shift for shift in _SMALLER_SHIFTS if shift < pmd_order))

    def read(self, pfns: Words) -> tuple[Words, _Orders]:
        """Return the flags, and the order of the folio, of each of `pfns`.

        Args:
            pfns: uint64, shape (frames,), in any order, repeated or not.

        Returns:
            Flags: ``KPF_*``, uint64, shape (frames,). Those of a tail have the SWAPBACKED bit of its head, also on
            kernels that do not show it for tails. A frame without memory has NOPAGE.
            Orders: int8, shape (frames,); ORDER_UNKNOWN if the folio changed during the read.
        """
        frames = pfns.view(np.int64)
        flags = np.empty(len(frames), np.uint64)
        orders = np.empty(len(frames), np.int8)
        for at in range(0, len(frames), PORTION_FRAMES):
            portion = slice(at, at + PORTION_FRAMES)
            # Chunks serve to measure folios, and most memory has only base pages, which need none.
            if self._shows_folios(frames[portion]):
                self._read(frames[portion], self._shifts, flags[portion], orders[portion])
            else:
                self._read_small(frames[portion], flags[portion], orders[portion])
        return flags, orders

    def folio_of(self, pfn: int) -> tuple[int, int]:
        """Return first frame and order of the folio that `pfn` lies in, found page by page, at any size.

        Returns:
            (head, order), with ORDER_UNKNOWN if the folio changed during the read.
        """
        head = pfn
        # A folio is naturally aligned: its head is at one of the alignments of its pages, the smallest of them first.
        for order in range(_LARGEST_ORDER):
            head = pfn >> order << order
            word = self.word(head)
            if word & abi.KPF_COMPOUND_HEAD:
                break
            if not word & abi.KPF_COMPOUND_TAIL:
                return (pfn, 0) if head == pfn else (pfn, ORDER_UNKNOWN)
        else:
            return pfn, ORDER_UNKNOWN
        order = (pfn - head).bit_length()
        while order < _LARGEST_ORDER and self.word(head + (1 << order)) & abi.KPF_COMPOUND_TAIL:
            order += 1
        return head, order

    def _shows_folios(self, frames: Frames) -> bool:
        """Return whether some of `frames`, evenly chosen, lie in large folios."""
        step = max(1, len(frames) // _SAMPLE)
        return any(self.word(pfn) & (abi.KPF_COMPOUND_HEAD | abi.KPF_COMPOUND_TAIL) for pfn in frames[::step].tolist())

    def _read_small(self, frames: Frames, flags: Words, orders: _Orders) -> None:
        """Fill in `flags` and `orders` of `frames`, few or none of which lie in large folios."""
        self._read_words(frames, flags)
        orders[:] = 0
        members = np.flatnonzero(flags & (_HEAD | _TAIL))
        if len(members):
            some_flags, some_orders = flags[members], orders[members]
            self._read(frames[members], self._shifts, some_flags, some_orders)
            flags[members], orders[members] = some_flags, some_orders

    def _read(self, frames: Frames, shifts: tuple[int, ...], flags: Words, orders: _Orders) -> None:
        """Fill in `flags` and `orders` of `frames`, with chunks of one of the sizes `shifts`, largest first."""
        chunks = self._choose(frames, shifts)
        shift = chunks.shift
        starts, ends = _runs(chunks.ids)
        buffer = self._load(chunks.ids[starts] << shift, (ends - starts) << shift)
        place = chunks.index << shift
        place |= frames & (1 << shift) - 1
        buffer.take(place, out=flags)
        if not int(np.bitwise_or.reduce(flags)) & (abi.KPF_COMPOUND_HEAD | abi.KPF_COMPOUND_TAIL):
            orders[:] = 0
            return
        _orders_in(buffer, shift).take(place, out=orders)
        self._close_open(frames, shifts, shift, flags, orders)
        _give_tails_swapbacked(buffer, shift, place, flags, orders)

    def _close_open(self, frames: Frames, shifts: tuple[int, ...], shift: int, flags: Words, orders: _Orders) -> None:
        """Find the orders that are open after reading with chunks of `shift`, in place."""
        still_open = np.flatnonzero(orders == _OPEN)
        if not len(still_open):
            return
        if larger := tuple(other for other in shifts if other > shift):
            open_flags, open_orders = flags[still_open], orders[still_open]
            self._read(frames[still_open], larger, open_flags, open_orders)
            flags[still_open], orders[still_open] = open_flags, open_orders
        else:
            orders[still_open] = self._follow(frames[still_open])

    def _follow(self, frames: Frames) -> _Orders:
        """Return the orders of `frames` in folios that fill the largest chunk, by one search for each folio."""
        ids, index = _distinct(frames >> self._top)
        orders = np.empty(len(ids), np.int8)
        head, order = 0, ORDER_UNKNOWN
        for at, pfn in enumerate((ids << self._top).tolist()):
            if order < 0 or not head <= pfn < head + (1 << order):
                head, order = self.folio_of(pfn)
            # A tail in a chunk that no folio fills has lost its head during the read.
            orders[at] = order if order >= self._top else ORDER_UNKNOWN
        return orders[index]

    def _choose(self, frames: Frames, shifts: tuple[int, ...]) -> _Chunks:
        """Return the chunks with which `frames` are read in the least time."""
        chunks = _Chunks(shifts[0], *_distinct(frames >> shifts[0]))
        seconds = chunks.seconds()
        for shift in shifts[1:]:
            # Smaller chunks have fewer unwanted words, and more calls.
            spared = (chunks.words - len(frames)) * SECONDS_PER_WORD
            if spared < len(frames) * _SECONDS_PER_DIVISION:
                break
            smaller = chunks.divided(frames, shift).closed()
            if smaller.seconds() >= seconds:
                break
            chunks, seconds = smaller, smaller.seconds()
        return chunks


def states_of(flags: Words) -> NDArray[np.uint16]:
    """Return the bits of :class:`~mthp.ptes.Pte` for kpageflags words: uint16, the shape of `flags`.

    ZERO, HUGETLB, SHARED (a KSM page) and LAZYFREE: anonymous and not backed by swap (folio_mark_lazyfree, mm/swap.c).
    A lazily freed page that was written since looks the same until reclaim reaches it: only the page table has its
    dirty bit, and no interface shows that by the page.
    """
    state = np.zeros(len(flags), np.uint16)
    # Most memory has none of these; two reductions detect that in a tenth of the time of the comparisons.
    some, all_of = int(np.bitwise_or.reduce(flags)), int(np.bitwise_and.reduce(flags))
    for bit, pte in ((abi.KPF_ZERO_PAGE, Pte.ZERO), (abi.KPF_HUGE, Pte.HUGETLB), (abi.KPF_KSM, Pte.SHARED)):
        if some & bit:
            state[(flags & np.uint64(bit)) != 0] |= np.uint16(pte)
    if some & abi.KPF_ANON and not all_of & abi.KPF_SWAPBACKED:
        # hugetlbfs and KSM pages can be anonymous without the bit too.
        state[(flags & _LAZYFREE_MASK) == np.uint64(abi.KPF_ANON)] |= np.uint16(Pte.LAZYFREE)
    return state


def _runs(ids: Frames) -> tuple[Frames, Frames]:
    """Return the runs of neighbouring chunks: positions in `ids` of their starts, and of their ends (exclusive)."""
    breaks = np.flatnonzero(np.diff(ids) != 1) + 1
    return np.concatenate(([0], breaks)), np.concatenate((breaks, [len(ids)]))


def _distinct(values: Frames) -> tuple[Frames, NDArray[np.int64]]:
    """Return the distinct `values`, ascending, and for each value its position among them; both int64."""
    if not len(values):
        return values, values
    low = int(values.min())
    span = int(values.max()) - low + 1
    if span > max(_LARGEST_TABLE, 16 * len(values)):
        distinct, index = np.unique(values, return_inverse=True)
        return distinct, index.astype(np.int64, copy=False)
    values = values - low
    # One assignment to a table of all possible values is much faster than sorting the values.
    table = np.zeros(span, np.bool_)
    table[values] = True
    distinct = np.flatnonzero(table)
    slots = np.empty(span, np.int64)
    slots[distinct] = np.arange(len(distinct))
    return distinct + low, slots[values]


def _orders_in(buffer: Words, shift: int) -> _Orders:
    """Return the folio order of every page in a buffer of whole chunks, `_OPEN` where the folio fills its chunk."""
    orders = np.zeros(len(buffer), np.int8)
    # Most memory is base pages, which need no search.
    members = np.flatnonzero(buffer & (_HEAD | _TAIL))
    words = buffer[members]
    begins = (words & _TAIL) == 0
    begins |= members & (1 << shift) - 1 == 0
    begins[1:] |= np.diff(members) != 1
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=len(members))
    first = words[starts]
    # frexp returns 2**k as 0.5 * 2**(k + 1), exactly.
    found = (np.frexp(lengths)[1] - 1).astype(np.int8)
    # It fills the chunk, or began in front of it: only a larger chunk shows its size.
    found[lengths == 1 << shift] = _OPEN
    found[(first & _TAIL) != 0] = _OPEN
    orders[members] = np.repeat(found, lengths)
    return orders


def _give_tails_swapbacked(buffer: Words, shift: int, place: NDArray[np.int64], flags: Words, orders: _Orders) -> None:
    """Copy the SWAPBACKED bit of a head to its anonymous tails: before Linux 6.16 they have flags of their own."""
    bare = np.flatnonzero((flags & _ANON_MEMBER) == np.uint64(abi.KPF_ANON | abi.KPF_COMPOUND_TAIL))
    # Larger folios have it already, from the larger chunk in which they were looked up.
    bare = bare[(orders[bare] > 0) & (orders[bare] <= shift)]
    if len(bare):
        heads = buffer[place[bare] >> orders[bare] << orders[bare]]
        flags[bare] |= heads & np.uint64(abi.KPF_SWAPBACKED)
