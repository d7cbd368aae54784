"""What the mover does to a loaded redis-server: 99th percentile of latency, and throughput, with it and without.

One server of 256 MiB of values, redis-benchmark beside it. First its figures with nobody else there; then while all
of its memory is collapsed to folios of 64 KiB with the default budget (a pause of 1 ms, half of the time at most), over
and over; then with the memory collapsed and the mover gone. Ratios are against the first.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np

from mthp.linux.live import LiveAddressSpace, open_live
from mthp.linux.mover.refuse.mapping import refuse_vma
from mthp.means import Means
from mthp.ptes import Block, Pte
from mthp.results import ScanResult

ORDER = 4
KEYS, VALUE = 150_000, 1500
REQUESTS = 150_000
CLIENTS = 20
MEANS = Means(mechanism="move")


def movable(space: LiveAddressSpace) -> list[Block]:
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


def measure(path: Path) -> tuple[float, float]:
    """Requests a second and the 99th percentile of latency in ms, of GETs."""
    command = ["redis-benchmark", "-s", str(path), "-t", "get", "-c", str(CLIENTS), "-n", str(REQUESTS)]
    command += ["-r", str(KEYS), "-d", str(VALUE), "--csv"]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    heads, values = ([word.strip('"') for word in line.split('","')] for line in text.strip().splitlines()[-2:])
    row = dict(zip(heads, values, strict=True))
    return float(row["rps"]), float(row["p99_latency_ms"])


def move_until(pid: int, over: threading.Event, told: list[int]) -> None:
    """Collapse what can be collapsed, and all that is new, until `over`."""
    with open_live(pid) as space:
        while not over.is_set():
            blocks = movable(space)
            for at in range(0, len(blocks), 256):
                outcomes = space.collapse_blocks(blocks[at : at + 256], MEANS)
                done = sum(outcome.result is ScanResult.SUCCEED for outcome in outcomes)
                told.append(done * space.geometry.size_of(ORDER))
                if over.is_set():
                    break
            else:
                over.wait(0.2)
        pauses = space.take_pauses()
        if pauses:
            p50, p99 = np.percentile(pauses, (50, 99)) / 1e6
            print(f"{'':>26} {len(pauses)} pauses, p50 {p50:.2f} ms, p99 {p99:.2f} ms, {sum(told) >> 20} MiB moved")


def main() -> None:
    if os.geteuid() or not shutil.which("redis-server") or not shutil.which("redis-benchmark"):
        print("skipped: needs root, redis-server and redis-benchmark (Debian: redis-server)")
        return
    directory = Path(tempfile.mkdtemp())
    path = directory / "redis"
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--disable-thp", "no", "--dir", str(directory)]
    with subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL) as server:
        try:
            while not path.exists():
                time.sleep(0.01)
            fill = ["redis-benchmark", "-s", str(path), "-t", "set", "-n", str(3 * KEYS), "-r", str(KEYS)]
            subprocess.run([*fill, "-d", str(VALUE), "-q"], check=True, stdout=subprocess.DEVNULL)
            print(f"{'redis-benchmark GET':>26} {'requests/s':>12} {'ratio':>7} {'p99 ms':>8} {'ratio':>7}")
            measure(path)
            without = measure(path)
            show("without the mover", without, without)
            over, told = threading.Event(), [0]
            mover = threading.Thread(target=move_until, args=(server.pid, over, told))
            mover.start()
            during = measure(path)
            over.set()
            mover.join()
            show("while it moves", during, without)
            show("afterwards", measure(path), without)
        finally:
            server.terminate()
    shutil.rmtree(directory)


def show(what: str, figures: tuple[float, float], peer: tuple[float, float]) -> None:
    rate, latency = figures
    print(f"{what:>26} {rate:12,.0f} {rate / peer[0]:7.2f} {latency:8.2f} {latency / peer[1]:7.2f}", flush=True)


if __name__ == "__main__":
    main()
