"""inspect of a process with 1 GiB of 4 KiB pages, against the bare reads of the same pagemap and kpageflags bytes.

The peer preads the pagemap of the memory at once, and kpageflags of the frames it found there in as few large preads
as their runs allow; finding those runs is not part of its time. Also: the peak memory of the whole command, on this
target and on a sparse one that maps 64 TiB.
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from mthp.engine.census import take_census
from mthp.linux.live import open_live
from peers import paired, show

SIZE = 1 << 30
PEAK_AIM = 150 << 20

TARGET = """
import mmap, sys
MAP_NORESERVE = 0x4000  # mman-common.h
memory = mmap.mmap(-1, int(sys.argv[1]), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
memory.madvise(mmap.MADV_NOHUGEPAGE)
for at in range(0, int(sys.argv[1]), int(sys.argv[2])):
    memory[at] = 1
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def target(size: int, step: int) -> Iterator[int]:
    """Start a process that maps `size` bytes and touches one page every `step` bytes, and return its PID."""
    command = [sys.executable, "-c", TARGET, str(size), str(step)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process.pid
        process.stdin.close()


class BareReads:
    """The reads that every reader needs, prepared: frames looked up, runs found, buffers allocated."""

    def __init__(self, pid: int, start: int, size: int) -> None:
        self._pagemap = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY)
        self._kpageflags = os.open("/proc/kpageflags", os.O_RDONLY)
        self._words = np.empty(size // mmap.PAGESIZE, np.uint64)
        self._offset = start // mmap.PAGESIZE * 8
        os.preadv(self._pagemap, [self._words.data], self._offset)
        frames = np.sort(self._words & np.uint64((1 << 55) - 1)).astype(np.int64)
        breaks = np.flatnonzero(np.diff(frames) > 1) + 1
        self._runs = [(int(run[0]) * 8, np.empty(len(run), np.uint64)) for run in np.split(frames, breaks)]

    def __call__(self) -> None:
        os.preadv(self._pagemap, [self._words.data], self._offset)
        for offset, flags in self._runs:
            os.preadv(self._kpageflags, [flags.data], offset)


def largest_mapping(pid: int) -> tuple[int, int]:
    with open_live(pid) as space:
        largest = max(space.vmas(), key=lambda vma: vma.size)
    return largest.start, largest.size


def show_peak(what: str, pid: int) -> None:
    """Print the peak resident memory of a whole ``mthp inspect``, in a process of its own, against what is allowed."""
    script = (
        "import resource, sys; from mthp.cli import main; code = main(['inspect', '--json', sys.argv[1]]);"
        " print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(pid)], check=True, capture_output=True, text=True)
    peak = int(done.stderr) << 10
    verdict = "ok" if peak <= PEAK_AIM else "MISSED"
    name = f"peak memory of mthp inspect, {what} / 150 MiB"
    print(f"{name:<76} {peak / PEAK_AIM:7.2f}  at most 1: {verdict:<11} {peak >> 20} MiB", flush=True)


def main() -> None:
    with target(SIZE, mmap.PAGESIZE) as pid:
        bare = BareReads(pid, *largest_mapping(pid))
        with open_live(pid) as space:
            show("inspect of 1 GiB in 4 KiB pages / its bare reads", paired(lambda: take_census(space), bare), 1.3)
        show_peak("1 GiB of 4 KiB pages", pid)
    with target(64 << 40, 64 << 30) as pid:
        show_peak("64 TiB mapped, 1024 pages touched", pid)


if __name__ == "__main__":
    main()
