"""Compare the daemon with the kernel's khugepaged, and measure its cost when it has nothing to do.

    python bench/bench_daemon.py [GIB]

- Time until GIB of memory of one process, in base pages on scattered frames, is as huge as its policy allows (the PMD
  size, which both can make): by the daemon; by the kernel's khugepaged with its default tunables, extrapolated from
  20 s; and by the kernel's khugepaged at full throttle.
- CPU time and memory of the daemon with 500 processes that need nothing.

Needs root. It sets switches and tunables of the machine, and puts them back.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from daemons import RunningDaemon
from thp_switches import ThpSwitches

PMD_SIZE = 2 << 20
EXTRAPOLATED_FROM = 20.0
IDLE_PROCESSES, IDLE_SECONDS = 500, 60.0
SETTLED_LOOKS = 5
"""Checks of a process after which the daemon checks it about as seldom as it ever does."""

TARGET = """
import ctypes, mmap, random, sys
import numpy as np
size = int(sys.argv[1])
libc = ctypes.CDLL(None)
memory = mmap.mmap(-1, size + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_NOHUGEPAGE)
pages = np.frombuffer(memory, np.uint8)[::4096]
# Touched in no order, so that neighbours in memory are no neighbours in frames.
pages[np.random.default_rng(7).permutation(len(pages))] = 7
print("ready", flush=True)
sys.stdin.readline()
memory.madvise(mmap.MADV_HUGEPAGE)
print("advised", flush=True)
sys.stdin.readline()
assert (pages == 7).all()
print("intact", flush=True)
"""


class Target:
    """A process with `size` bytes in base pages. A method advises them."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._process = subprocess.Popen(
            [sys.executable, "-c", TARGET, str(size)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self._process.pid
        self._hear("ready")

    def advise(self) -> None:
        self._tell("advised")

    def end(self) -> None:
        self._tell("intact")
        self._process.wait()

    def _tell(self, answer: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        self._hear(answer)

    def _hear(self, word: str) -> None:
        assert self._process.stdout is not None
        heard = self._process.stdout.readline().strip()
        if heard != word:
            raise RuntimeError(f"the target said {heard!r} instead of {word!r}")

    @property
    def huge(self) -> int:
        """Bytes that PMD entries map."""
        text = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return int(text.split("AnonHugePages:")[1].split()[0]) << 10

    def wait_until_huge(self, limit: float) -> tuple[float, int]:
        """Seconds until all of it is huge, or `limit`; and the bytes that are."""
        begun = time.monotonic()
        while (huge := self.huge) < self.size - 2 * PMD_SIZE and time.monotonic() - begun < limit:
            time.sleep(0.01)
        return time.monotonic() - begun, huge


@contextlib.contextmanager
def switches() -> Iterator[ThpSwitches]:
    with tempfile.NamedTemporaryFile() as state:
        made = ThpSwitches(Path(state.name))
        try:
            yield made
        finally:
            made.restore()


def by_daemon(size: int, set_to: ThpSwitches, *arguments: str) -> float:
    """Seconds from the daemon's first sight of the memory on; every size is off, so that the kernel leaves it alone."""
    set_to.only()
    target = Target(size)
    with tempfile.TemporaryDirectory() as directory:
        with RunningDaemon(Path(directory) / "run", "--comm", "none", wait=True) as warm:
            warm.stop()
        target.advise()
        begun = time.monotonic()
        with RunningDaemon(Path(directory) / "run", "--pid", str(target.pid), "--orders", "2M", *arguments, wait=False):
            _, huge = target.wait_until_huge(120.0)
            taken = time.monotonic() - begun
    target.end()
    if huge < size - 2 * PMD_SIZE:
        raise RuntimeError(f"only {huge >> 20} of {size >> 20} MiB became huge")
    return taken


def by_kernel(size: int, set_to: ThpSwitches, limit: float, **tunables: int) -> float:
    """Seconds that the kernel's khugepaged takes, or would: extrapolated if it is not done within `limit`."""
    target = Target(size)
    for name, value in tunables.items():
        set_to.set(f"khugepaged/{name}", str(value))
    set_to.only("2048kB")
    target.advise()
    taken, huge = target.wait_until_huge(limit)
    set_to.only()
    target.end()
    return taken if huge >= size - 2 * PMD_SIZE else taken * size / max(huge, PMD_SIZE)


def idle(processes: int, seconds: float) -> tuple[float, int]:
    """Return the CPU time, as a share of one core, and the memory of a daemon with nothing to do."""
    idlers = [subprocess.Popen(["sleep", "1000"]) for _ in range(processes)]
    try:
        with (
            tempfile.TemporaryDirectory() as directory,
            RunningDaemon(Path(directory) / "run", "--comm", "sleep") as daemon,
        ):
            while len(daemon.status()["targets"]) < processes:
                time.sleep(0.1)
            # The first looks at each are work, and come within seconds.
            while min(target["looks"] for target in daemon.status()["targets"]) < SETTLED_LOOKS:
                time.sleep(2.0)
            before = daemon.status()
            time.sleep(seconds)
            after = daemon.status()
    finally:
        for idler in idlers:
            idler.kill()
            idler.wait()
    return (after["cpu_seconds"] - before["cpu_seconds"]) / seconds, after["resident_memory_bytes"]


def main(gib: float) -> None:
    size = int(gib * (1 << 30)) // PMD_SIZE * PMD_SIZE
    if os.geteuid():
        raise SystemExit("needs root")
    with switches() as set_to:
        default = by_daemon(size, set_to)
        free = by_daemon(size, set_to, "--cpu", "100%")
        kernel = by_kernel(size, set_to, EXTRAPOLATED_FROM)
        throttle = by_kernel(
            size, set_to, 120.0, pages_to_scan=10_000_000, scan_sleep_millisecs=0, alloc_sleep_millisecs=0
        )
    what = f"{gib:g} GiB as huge as the policy allows"
    print(f"{what}: daemon {default:.2f} s, with --cpu 100% {free:.2f} s (its start included)")
    print(
        f"{what}: khugepaged by default {kernel:.0f} s (from {EXTRAPOLATED_FROM:g} s), full throttle {throttle:.2f} s"
    )
    for name, taken in (("daemon", default), ("daemon --cpu 100%", free)):
        against = kernel / taken
        print(
            f"{name} against khugepaged default: {against:.0f} times as fast, at least 100: {_verdict(against >= 100)}"
        )
    share = throttle / free
    print(f"daemon --cpu 100% against full throttle: {share:.2f} times as fast; at least 0.5: {_verdict(share >= 0.5)}")
    cpu, memory = idle(IDLE_PROCESSES, IDLE_SECONDS)
    print(f"{IDLE_PROCESSES} idle targets: {100 * cpu:.2f}% of a core; below 1%: {_verdict(cpu < 0.01)}")
    print(f"{IDLE_PROCESSES} idle targets: {memory >> 20} MiB; below 120: {_verdict(memory < 120 << 20)}")


def _verdict(good: bool) -> str:
    return "ok" if good else "MISSED"


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.0)
