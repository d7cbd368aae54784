"""Measure how fast the mover moves memory, against MADV_COLLAPSE, and how long it stops a target, phase by phase.

*Throughput.* The target has 256 MiB of 4 KiB pages, scattered in physical memory. The mover makes folios of one order
of all of it; in the same run, MADV_COLLAPSE makes folios of 2 MiB of as much memory of the same kind. The time is that
of the mover's pauses, without the rests between. On both sides the working threads have a real-time policy, so other
work on the machine hardly counts.

*Pauses.* From the interruption of the first thread to the release of the last, for 8 blocks of 64 KiB, with 1, 8 and 64
threads. The floor is the same ptrace requests for as many threads, from a loop in C with nothing in between
(``ptrace_floor.c``), plus the time of the moved blocks' own system calls and copies. The medians of the phases show
where the rest of the time goes.

*Checking again.* `mthp collapse` checks blocks before the stop, and facts of process, mappings and pages again once all
threads are stopped. That time is added to a pause. The session alone, which is measured above, does not check.

Needs root; sets the per-size switches through the mover's own journal and puts them back.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from mthp.geometry import X86_64 as GEOMETRY
from mthp.linux import abi
from mthp.linux.journal.switches import SwitchJournal
from mthp.linux.live import open_live
from mthp.linux.mover.freeze import FrozenProcess
from mthp.linux.mover.outcome import Objection
from mthp.linux.mover.pause import Pause
from mthp.linux.mover.recheck import Before, Recheck
from mthp.linux.mover.refuse.sharing import last_pid
from mthp.linux.mover.session import MoverSession
from mthp.linux.process import Process
from mthp.ptes import Block
from peers import compiled

SIZE = 256 << 20
WINDOW_NS = 50_000_000
ORDERS = (4, 5, 6, 7, 8)
AIM_BELOW, AIM_FROM_512K = 0.7, 1.0
PAUSE_AIMS_MS = {1: 1.5, 8: 1.5, 64: 4.0}
BLOCKS, PAUSES, RECHECKS = 8, 60, 30
PHASES = ("stop", "park", "move", "copy", "restore")

TARGET = """
import ctypes, mmap, random, sys, threading
size, threads = int(sys.argv[1]), int(sys.argv[2])
for _ in range(threads - 1):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
memory = mmap.mmap(-1, size + (2 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
begin = -start % (2 << 20)
# Each page comes when it is touched, in an order that has nothing to do with addresses.
pages = list(range(begin, begin + size, mmap.PAGESIZE))
random.seed(1)
random.shuffle(pages)
for at in pages:
    memory[at:at + 8] = at.to_bytes(8, "little")
print(start + begin, flush=True)
sys.stdin.readline()
print(all(int.from_bytes(memory[at:at + 8], "little") == at for at in pages), flush=True)
sys.stdin.read()
"""


class Target:
    """A process with scattered memory.

    Attributes:
        pid: its PID.
        start: where the memory begins.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.pid = process.pid
        self.start = int(self._say())

    def _say(self, word: str = "") -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if word:
            self._process.stdin.write(word)
            self._process.stdin.flush()
        return self._process.stdout.readline()

    def check(self) -> None:
        """Have it check its memory."""
        if self._say("check\n") != "True\n":
            raise SystemExit("the target's memory is not what it was")


@contextmanager
def target(size: int, threads: int) -> Iterator[Target]:
    """A process with `size` bytes of scattered base pages and `threads` threads."""
    command = [sys.executable, "-c", TARGET, str(size), str(threads)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Target(process)
        assert process.stdin is not None
        process.stdin.close()


def warm() -> None:
    """Use and free as much memory as is moved: a virtual machine may have to be given it by its host first."""
    with mmap.mmap(-1, 2 * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = 1


@contextmanager
def undisturbed(pid: int) -> Iterator[None]:
    """While it lasts, the first threads of this process and of `pid` run before any of the ordinary policy."""
    for thread in (0, pid):
        os.sched_setscheduler(thread, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        for thread in (0, pid):
            os.sched_setscheduler(thread, os.SCHED_OTHER, os.sched_param(0))


def collapse_ns_per_byte() -> float:
    """What MADV_COLLAPSE takes, in the target as the mover works on it."""
    with target(SIZE, 1) as peer, Process(peer.pid) as process:
        warm()
        done = 0
        with undisturbed(peer.pid):
            began = time.perf_counter_ns()
            for address in range(peer.start, peer.start + SIZE, GEOMETRY.pmd_size):
                done += not abi.process_madvise(process.pidfd, address, GEOMETRY.pmd_size, abi.MADV_COLLAPSE)
            took = time.perf_counter_ns() - began
        peer.check()
    return took / max(done * GEOMETRY.pmd_size, 1)


def move_ns_per_byte(order: int) -> float:
    """What the mover takes to make folios of `order`."""
    size = GEOMETRY.size_of(order)
    with target(SIZE, 1) as ours, Process(ours.pid) as process, SwitchJournal().only(order):
        warm()
        with (
            undisturbed(ours.pid),
            MoverSession(process, GEOMETRY, max_pause_ns=WINDOW_NS, duty=1.0) as session,
        ):
            outcomes = session.move([(address, order) for address in range(ours.start, ours.start + SIZE, size)])
        with open_live(ours.pid) as space:
            made = int((space.read([(ours.start, ours.start + SIZE)]).folio_order == order).sum()) >> order
        if made < len(outcomes) // 2:
            print(f"  only {made} of {len(outcomes)} blocks became folios of order {order}")
        moved = sum(outcome.copied for outcome in outcomes) * GEOMETRY.page_size
        took = sum(pause.total_ns for pause in session.pauses)
        ours.check()
    return took / max(moved, 1)


def show_throughput() -> None:
    print(f"{SIZE >> 20} MiB of scattered base pages; GB/s of the mover / of MADV_COLLAPSE, medians of 3 rounds")
    ratios: dict[int, list[float]] = {order: [] for order in ORDERS}
    peers, speeds = [], {order: [] for order in ORDERS}  # type: ignore[var-annotated]
    for _ in range(3):
        peer = collapse_ns_per_byte()
        peers.append(1 / peer)
        for order in ORDERS:
            ours = move_ns_per_byte(order)
            speeds[order].append(1 / ours)
            ratios[order].append(peer / ours)
    for order in ORDERS:
        aim = AIM_FROM_512K if order >= 7 else AIM_BELOW
        ratio = statistics.median(ratios[order])
        verdict = f"at least {aim}: {'ok' if ratio >= aim else 'MISSED'}"
        times = f"{statistics.median(speeds[order]):.2f} against {statistics.median(peers):.2f} GB/s"
        print(f"  folios of {GEOMETRY.label(order):<5} {ratio:7.2f}  {verdict:<22} {times}", flush=True)


def pauses_of(threads: int) -> list[Pause]:
    """Pauses in which 8 blocks of 64 KiB were moved, each time others."""
    size = GEOMETRY.size_of(4)
    with target((PAUSES + 2) * BLOCKS * size, threads) as ours, Process(ours.pid) as process:
        blocks = [(ours.start + number * size, 4) for number in range((PAUSES + 2) * BLOCKS)]
        with SwitchJournal().only(4), MoverSession(process, GEOMETRY, max_pause_ns=10**9, duty=1.0) as session:
            # The first window has one block, from which the session learns.
            session.move(blocks[:BLOCKS])
            session.pauses.clear()
            for at in range(BLOCKS, len(blocks), BLOCKS):
                session.move(blocks[at : at + BLOCKS])
                time.sleep(0.002)
            pauses = [pause for pause in session.pauses if pause.blocks == BLOCKS]
        ours.check()
    return pauses


def floor_ns(threads: int) -> int:
    """Return the same ptrace requests made by a loop in C: median over as many rounds, in nanoseconds."""
    library = compiled("ptrace_floor.c")
    library.ptrace_floor.restype = ctypes.c_long
    return int(library.ptrace_floor(threads, PAUSES))


def show_pauses() -> None:
    print(f"\npause for {BLOCKS} blocks of 64 KiB in ms, medians of {PAUSES}; last, against the floor of ptrace in C")
    print(
        f"  {'threads':>7} {'pause':>7} {'aim':>12} " + "".join(f"{name:>9}" for name in PHASES) + "    floor   ratio"
    )
    for threads, aim in PAUSE_AIMS_MS.items():
        pauses = pauses_of(threads)
        total = statistics.median(pause.total_ns for pause in pauses)
        phases = [statistics.median(getattr(pause, f"{name}_ns") for pause in pauses) for name in PHASES]
        fixed = statistics.median(pause.fixed_ns for pause in pauses)
        floor = floor_ns(threads)
        verdict = f"{aim} {'ok' if total <= aim * 1e6 else 'MISSED'}"
        columns = "".join(f"{phase / 1e6:9.2f}" for phase in phases)
        print(
            f"  {threads:7} {total / 1e6:7.2f} {verdict:>12} {columns}{floor / 1e6:9.2f}{fixed / floor:8.2f}",
            flush=True,
        )
    print("  (the floor and its ratio are of stop, park and restore)")


def recheck_ns(threads: int, count: int) -> list[int]:
    """Return the time to check `count` adjoining blocks of 64 KiB again while the target is stopped."""
    size = GEOMETRY.size_of(4)
    taken: list[int] = []
    with target(count * size, threads) as ours, open_live(ours.pid) as space, SwitchJournal().only(4):
        recheck = Recheck(space.process, GEOMETRY)
        before = Before(space.vmas(), np.empty(0, np.uint64), last_pid(), has_userfaultfd=False, fill=True)

        def ask(frozen: FrozenProcess, blocks: Sequence[Block]) -> list[Objection | None]:
            began = time.perf_counter_ns()
            objections = recheck.objections(frozen, blocks, before)
            if len(blocks) == count:
                taken.append(time.perf_counter_ns() - began)
            return objections

        with MoverSession(space.process, GEOMETRY, max_pause_ns=10**9, duty=1.0, recheck=ask) as session:
            for _ in range(RECHECKS):
                session.move([(ours.start + number * size, 4) for number in range(count)])
        recheck.close()
        ours.check()
    return taken


def show_recheck() -> None:
    print("\nasking again after the stop, in ms, medians")
    for threads, count in ((1, BLOCKS), (64, BLOCKS), (1, 512)):
        took = statistics.median(recheck_ns(threads, count))
        print(f"  {threads:2} threads, {count:3} blocks of 64 KiB {took / 1e6:7.2f}", flush=True)


def main() -> None:
    if os.geteuid() or os.uname().machine != "x86_64" or mmap.PAGESIZE != 4096:
        print("skipped: needs root on x86-64")
        return
    show_throughput()
    show_pauses()
    show_recheck()


if __name__ == "__main__":
    main()
