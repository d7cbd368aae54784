"""Read files with a 64-bit word for every page frame of the machine: ``/proc/kpageflags`` and ``/proc/kpagecount``.

The frames of a process are scattered, and a call costs as much as a dozen words. So the frames are sorted and read in
that order: neighbours in one call, together with gaps that are read faster than a new call is made.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from mthp.closing import Closing
from mthp.linux import abi

KPAGECOUNT = "/proc/kpagecount"

PORTION_FRAMES = 1 << 18
"""Frames that are looked up at a time, to bound the memory for it."""

SECONDS_PER_CALL = 1.1e-6
SECONDS_PER_WORD = 0.098e-6
"""Seconds for a call from Python, and for a word in it, measured on x86-64."""

_WORDS_A_CALL = int(SECONDS_PER_CALL / SECONDS_PER_WORD)
"""Words that are read in the time of a call."""

_MOST_THREADS = 4
FEWEST_WORDS_A_THREAD = 1 << 14
"""About 1.5 milliseconds of reading, much more than the start of a thread takes."""

FEWEST_WORDS_A_CALL = 1 << 5
"""Shorter calls leave the interpreter little time between them for other threads."""

Frames = NDArray[np.int64]
Words = NDArray[np.uint64]


class FrameWords(Closing):
    """A reader of the words of frames. Several threads may use one at once.

    Args:
        threads: how many share a long read; as many as processors, up to four, if not given.
        share: the fewest words of a thread.
        call: the fewest words of a call, on average, of a read that threads share.

    Raises:
        OSError: it cannot be opened: it takes root and CAP_SYS_ADMIN.
    """

    def __init__(
        self,
        path: str,
        threads: int | None = None,
        share: int = FEWEST_WORDS_A_THREAD,
        call: int = FEWEST_WORDS_A_CALL,
    ) -> None:
        self._threads = threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))
        self._share, self._call = share, call
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def words(self, pfns: Words) -> Words:
        """Return the words of `pfns`: uint64, shape (frames,)."""
        frames = pfns.view(np.int64)
        words = np.empty(len(frames), np.uint64)
        for at in range(0, len(frames), PORTION_FRAMES):
            portion = slice(at, at + PORTION_FRAMES)
            self._read_words(frames[portion], words[portion])
        return words

    def words_at(self, pfns: Words) -> Words:
        """Return the words of `pfns`, by one call for each: uint64, shape (frames,). For few frames, far apart."""
        return np.fromiter((self.word(pfn) for pfn in pfns.tolist()), np.uint64, len(pfns))

    def word(self, pfn: int) -> int:
        """Return the bare word of one frame; KPF_NOPAGE where there is no memory."""
        text = os.pread(self._fd, abi.PM_ENTRY_BYTES, pfn * abi.PM_ENTRY_BYTES)
        return int.from_bytes(text, sys.byteorder) if text else abi.KPF_NOPAGE

    def _read_words(self, frames: Frames, words: Words) -> None:
        """Fill in the bare `words` of `frames`, at most `PORTION_FRAMES`."""
        if not len(frames):
            return
        # Each frame with its index in the low bits, because sorting these takes less than half the time of np.argsort.
        # They fit: a frame number has at most 40 bits, as physical addresses have at most 52 (x86-64, arm64 with LPA).
        bits = PORTION_FRAMES.bit_length() - 1
        place = frames << bits
        place |= np.arange(len(frames))
        place.sort()
        index = place & PORTION_FRAMES - 1
        place >>= bits
        # A gap of fewer words is read along, in less time than another call takes.
        firsts = np.flatnonzero(np.diff(place, prepend=-PORTION_FRAMES) > _WORDS_A_CALL + 1)
        starts, ends = place[firsts], place[np.append(firsts[1:], len(place)) - 1] + 1
        buffer = self._load(starts, ends - starts)
        # Move from each range's position in the file to its position in the buffer.
        place += np.repeat(np.cumsum(ends - starts) - ends, np.diff(firsts, append=len(place)))
        words[index] = buffer.take(place)

    def _load(self, starts: Frames, sizes: Frames) -> Words:
        """Return the words of ranges of frames, one range after another.

        Args:
            starts, sizes: first frame, and number of frames, of each range: int64, shape (ranges,).
        """
        ends = np.cumsum(sizes)
        buffer = np.empty(int(ends[-1]) if len(ends) else 0, np.uint64)
        share = -(-len(buffer) // self._threads)
        if share < self._share or len(buffer) < self._call * len(ends):
            self._load_part(starts - (ends - sizes), ends, 0, buffer)
            return buffer
        # Nearly all of the time is spent in the kernel, without a lock, while Python lets other threads run.
        with ThreadPoolExecutor(self._threads) as pool:
            parts = [
                pool.submit(self._load_part, starts - (ends - sizes), ends, at, buffer[: at + share])
                for at in range(0, len(buffer), share)
            ]
        for part in parts:
            part.result()
        return buffer

    def _load_part(self, moved: Frames, ends: Frames, begin: int, buffer: Words) -> None:
        """Read the words from `begin` to the end of `buffer`.

        Args:
            moved: start of each range in frames, less its start in the buffer.
            ends: end of each range in the buffer.
        """
        first = int(np.searchsorted(ends, begin, side="right"))
        last = int(np.searchsorted(ends, len(buffer))) + 1
        stops = np.minimum(ends[first:last], len(buffer))
        starts = np.concatenate(([begin], stops[:-1]))
        size = abi.PM_ENTRY_BYTES
        # A memoryview is sliced faster than an array, and there are many slices.
        memory = buffer.view(np.uint8).data
        offsets = (starts + moved[first:last]) * size
        for start, stop, offset in zip(
            (starts * size).tolist(), (stops * size).tolist(), offsets.tolist(), strict=True
        ):
            got = os.preadv(self._fd, [memory[start:stop]], offset)
            while got < stop - start:
                if not (more := os.preadv(self._fd, [memory[start + got : stop]], offset + got)):
                    # Missing words lie beyond the last frame of memory: the memory of a device.
                    buffer[(start + got) // size : stop // size] = abi.KPF_NOPAGE
                    break
                got += more
