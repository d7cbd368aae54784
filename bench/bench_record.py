"""A recording with one step a second, of a process with 4 GiB of 4 KiB pages, against the bare reads of the same bytes.

The peer preads the pagemap of the memory and kpageflags of its frames once, prepared as in ``bench_inspect.py``; both
figures are processor time of this process. Also: what is left of a step once one read of pagemap alone is taken away,
as a share of one processor; and the bytes that a minute of a quiet process takes.
"""

from __future__ import annotations

import mmap
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench_inspect import BareReads, largest_mapping, target
from mthp.linux.live import open_live
from mthp.linux.pagemap import Pagemap
from mthp.linux.process import Process
from mthp.snapshot import Pace, record_series
from mthp.snapshot.recorder import StepTaker
from peers import Pair, show

SIZE = 4 << 30
STEPS = 32
SHARE_AIM = 0.03
MINUTE_AIM = 1 << 20
SECONDS = 10.0


def cpu_of(function: Callable[[], object]) -> float:
    begin = time.process_time()
    function()
    return time.process_time() - begin


def main() -> None:
    with target(SIZE, mmap.PAGESIZE) as pid:
        start, size = largest_mapping(pid)
        bare = BareReads(pid, start, size)
        with open_live(pid) as space, Process(pid) as process:
            pagemap = Pagemap(process)
            taker = StepTaker(space)
            taker.take()
            rounds = [
                (cpu_of(taker.take), cpu_of(bare), cpu_of(lambda: pagemap.read([(start, start + size)])))
                for _ in range(STEPS)
            ]
            pagemap.close()
            step, reads, words = (statistics.mean(column) for column in zip(*rounds, strict=True))
            # In a second there is one step.
            show(
                "a step of a recording of 4 GiB / its bare reads",
                Pair(step, reads, step / reads),
                1 + SHARE_AIM / reads,
            )
            left = step - words
            print(f"a step each second, on top of reading pagemap once: {left:.1%} of a processor")
            with tempfile.TemporaryDirectory() as directory:
                first = record_series(space, Path(directory) / "first", Pace(duration=0.01))
                done = record_series(space, Path(directory) / "r", Pace(every=1.0, duration=SECONDS))
            minute = (done.bytes - first.bytes) / done.seconds * 60
            print(f"a minute of a quiet process: {minute / 1024:.0f} KiB, at most {MINUTE_AIM >> 10}")


if __name__ == "__main__":
    main()
