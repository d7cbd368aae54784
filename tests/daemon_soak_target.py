"""A target of the soak: its threads write and check their memory while it forks; it prints its counts.

    python daemon_soak_target.py BYTES

It works until its standard input ends, then prints its counts, or dies with the difference.
"""

from __future__ import annotations

import mmap
import os
import random
import sys
import threading
import time

import numpy as np

from waiting import FACTOR

THREADS = 3
PAGE = mmap.PAGESIZE


def write_and_check(words: np.ndarray[tuple[int], np.dtype[np.uint64]], seed: int, until: threading.Event) -> int:
    """Write pages of this thread's part in random order, and check each before writing it again.

    A page holds a number and a value computed from it, so that a page of another time is detected.
    """
    draw = random.Random(seed)
    pages = len(words) // (PAGE // 8)
    expected = [0] * pages
    rounds = 0
    while not until.is_set():
        page = draw.randrange(pages)
        at = page * (PAGE // 8)
        if int(words[at]) != expected[page] or int(words[at + PAGE // 8 - 1]) != expected[page] ^ seed * bool(
            expected[page]
        ):
            os.write(2, f"page {page}: {int(words[at])} instead of {expected[page]}\n".encode())
            os._exit(3)
        expected[page] += 1
        words[at] = expected[page]
        words[at + PAGE // 8 - 1] = expected[page] ^ seed
        rounds += 1
    for page in range(pages):
        if int(words[page * (PAGE // 8)]) != expected[page]:
            os.write(2, f"page {page} in the end\n".encode())
            os._exit(4)
    return rounds


def end_with_input(ended: threading.Event) -> None:
    """Say so when the standard input has ended."""
    sys.stdin.read()
    ended.set()


def main(size: int) -> None:
    # An emulated processor is too slow for all threads, so the tested program has priority.
    os.nice(19 if FACTOR > 1 else 0)
    memory = mmap.mmap(-1, size + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    words = np.frombuffer(memory, np.uint64)[: size // 8]
    words[:: PAGE // 8] = 0
    memory.madvise(mmap.MADV_HUGEPAGE)
    until = threading.Event()
    done = [0] * THREADS
    part = len(words) // THREADS // (PAGE // 8) * (PAGE // 8)

    def work(index: int) -> None:
        done[index] = write_and_check(words[index * part : (index + 1) * part], index + 1, until)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    print("ready", flush=True)
    ended = threading.Event()
    threading.Thread(target=end_with_input, args=(ended,), daemon=True).start()
    forks = 0
    while not ended.wait(0.5):
        child = os.fork()
        if child == 0:
            # The child has the memory of one moment; it checks a part, and exits.
            total = int(words[:: PAGE // 8].sum())
            time.sleep(0.05)
            os._exit(0 if int(words[:: PAGE // 8].sum()) == total else 5)
        _, status = os.waitpid(child, 0)
        if status:
            os.write(2, f"a child saw its memory change: {status}\n".encode())
            os._exit(6)
        forks += 1
    until.set()
    for thread in threads:
        thread.join()
    print(sum(done), forks, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
