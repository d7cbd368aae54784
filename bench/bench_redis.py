"""Measure the effect of mthp on a loaded redis-server: throughput and p99 of latency before, during and after its work.

    python bench/bench_redis.py [move|split|trim ...]

redis-benchmark loads one server with 150 000 values of 1 500 bytes: first without mthp, then while mthp works on its
memory repeatedly, then without mthp again. Ratios are against the first. The work:

- *move*, *split*: the mechanism makes folios of 64 KiB of all of its memory, and of new memory. The mover has its
  default budget (pauses of 1 ms, half of the time at most).
- *trim*: MADV_COLLAPSE makes all PMD ranges huge pages, and a trim returns their pages of zeroes, in turn.

Needs root, and for *split* debugfs, which kernel lockdown closes. MTHP_BENCH_KEYS makes it smaller, for a guest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mthp.linux.live import LiveAddressSpace, open_live
from mthp.means import Means, Mechanism
from mthp.movechecks import refuse_vma
from mthp.ptes import Block, Pte
from mthp.results import ScanResult

ORDER = 4
KEYS, VALUE = int(os.environ.get("MTHP_BENCH_KEYS", "150000")), 1500
CLIENTS = 20

Work = Callable[[LiveAddressSpace, threading.Event], str]
"""A function that works on a space until the event is set, and returns its work."""


def whole_ranges(space: LiveAddressSpace) -> list[Block]:
    """Return the PMD ranges of mappings that may be moved, with contents, and none in a PMD folio."""
    geometry, found = space.geometry, []
    size, order = geometry.pmd_size, geometry.pmd_order
    for vma in space.vmas():
        start, end = -(-vma.start // size) * size, vma.end // size * size
        if end > start and refuse_vma(vma) is None:
            orders = space.read([(start, end)]).folio_order.reshape(-1, 1 << order)
            fit = np.flatnonzero((orders.max(axis=1) >= 0) & (orders.max(axis=1) < order))
            found += [(start + at * size, order) for at in fit.tolist()]
    return found


def small_blocks(space: LiveAddressSpace) -> list[Block]:
    """Blocks of whole, small pages in mappings that may be moved."""
    size = space.geometry.size_of(ORDER)
    found: list[Block] = []
    for vma in space.vmas():
        start, end = -(-vma.start // size) * size, vma.end // size * size
        if end > start and refuse_vma(vma) is None:
            columns = space.read([(start, end)])
            small = ((columns.state & np.uint16(Pte.PRESENT | Pte.ZERO)) == np.uint16(Pte.PRESENT)) & (
                columns.folio_order < ORDER
            )
            whole = np.flatnonzero(small.reshape(-1, 1 << ORDER).all(axis=1))
            found += [(start + block * size, ORDER) for block in whole.tolist()]
    return found


def made_by(mechanism: Mechanism) -> Work:
    """Return work that makes folios of 64 KiB by a mechanism."""
    means = Means(mechanism=mechanism)

    def work(space: LiveAddressSpace, over: threading.Event) -> str:
        made = 0
        while not over.is_set():
            blocks = small_blocks(space)
            for at in range(0, len(blocks), 256):
                outcomes = space.collapse_blocks(blocks[at : at + 256], means)
                made += sum(outcome.result is ScanResult.SUCCEED for outcome in outcomes)
                if over.is_set():
                    break
            else:
                over.wait(0.2)
        said = f"{made * space.geometry.size_of(ORDER) >> 20} MiB made"
        if pauses := space.take_pauses():
            p50, p99 = np.percentile(pauses, (50, 99)) / 1e6
            said += f", {len(pauses)} pauses, p50 {p50:.2f} ms, p99 {p99:.2f} ms"
        return said

    return work


def collapsed_and_trimmed(space: LiveAddressSpace, over: threading.Event) -> str:
    """Make PMD ranges huge pages and return their pages of zeroes, in turn."""
    geometry = space.geometry
    made = given = 0
    while not over.is_set():
        for at in whole_ranges(space):
            if over.is_set():
                break
            (outcome,) = space.collapse_blocks([at])
            if outcome.result is ScanResult.SUCCEED:
                made += 1
                zero = space.zero_filled(space.read([(at[0], at[0] + geometry.pmd_size)]))
                (trimmed,) = space.trim_folios([at], [zero], "cold")
                given += trimmed.given_back
        over.wait(0.01)
    return f"{made} ranges collapsed, {given * geometry.page_size >> 20} MiB given back"


WORK: dict[str, Work] = {"move": made_by("move"), "split": made_by("split"), "trim": collapsed_and_trimmed}


def measure(path: Path) -> tuple[float, float]:
    """Requests a second and the 99th percentile of latency in ms, of GETs."""
    command = ["redis-benchmark", "-s", str(path), "-t", "get", "-c", str(CLIENTS), "-n", str(KEYS)]
    command += ["-r", str(KEYS), "-d", str(VALUE), "--csv"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    heads, values = ([word.strip('"') for word in line.split('","')] for line in text.strip().splitlines()[-2:])
    row = dict(zip(heads, values, strict=True))
    return float(row["rps"]), float(row["p99_latency_ms"])


def bench(name: str) -> None:
    """Print the figures of a server of its own for one kind of work."""
    directory = Path(tempfile.mkdtemp())
    path = directory / "redis"
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--disable-thp", "no", "--dir", str(directory)]
    with subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL) as server:
        try:
            while not path.exists():
                time.sleep(0.01)
            fill = ["redis-benchmark", "-s", str(path), "-t", "set", "-n", str(3 * KEYS), "-r", str(KEYS)]
            subprocess.run([*fill, "-d", str(VALUE), "-q"], check=True, stdout=subprocess.DEVNULL)
            measure(path)
            before = measure(path)
            show(f"before {name}", before, before)
            over, said = threading.Event(), [""]

            def run() -> None:
                with open_live(server.pid) as space:
                    said[0] = WORK[name](space, over)

            worker = threading.Thread(target=run)
            worker.start()
            during = measure(path)
            over.set()
            worker.join()
            show(f"during {name}", during, before)
            show(f"after {name}", measure(path), before)
            print(f"{'':>16} {said[0]}", flush=True)
        finally:
            server.terminate()
    shutil.rmtree(directory)


def show(what: str, figures: tuple[float, float], peer: tuple[float, float]) -> None:
    rate, latency = figures
    print(f"{what:>16} {rate:12,.0f} {rate / peer[0]:7.2f} {latency:8.2f} {latency / peer[1]:7.2f}", flush=True)


def main(names: list[str]) -> None:
    if os.geteuid() or not shutil.which("redis-server") or not shutil.which("redis-benchmark"):
        print("skipped: needs root, redis-server and redis-benchmark (Debian: redis-server)")
        return
    with open_live("self") as space:
        able = {"move": True, "split": space.splits(), "trim": "cold" in space.trims_by}
    print(f"{'redis GET':>16} {'requests/s':>12} {'ratio':>7} {'p99 ms':>8} {'ratio':>7}")
    for name in names or WORK:
        if able[name]:
            bench(name)
        else:
            print(f"{name}: not measured, since it does not work here (mthp doctor says why)")


if __name__ == "__main__":
    main(sys.argv[1:])
