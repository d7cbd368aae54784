"""Compare BGSAVE on a redis-server under `mthp daemon` with one without THP, and measure when its coverage is back.

    python bench/bench_bgsave.py

Two servers hold the same data: one with THP switched off for itself, one under `mthp daemon`. In turn each saves its
data while random writes load it. The ratio is that of the 99th percentiles of latency. "off to off" is the ratio of the
server without THP to its own measurement before, and shows the effect of other work on the machine. During a save the
child shares the memory, and writes copy pages, which breaks up huge pages; the daemon leaves the process alone until
the child has ended. Then the time until PMD entries map 90 % of the memory again is measured.

Needs root, redis-server and redis-benchmark, and THP that is not "never". MTHP_BENCH_KEYS makes it smaller.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

KEYS, VALUE = int(os.environ.get("MTHP_BENCH_KEYS", "150000")), 1500
CLIENTS = 20
TURNS = int(os.environ.get("MTHP_BENCH_TURNS", "7"))

WANTED = 0.9
"""Share of the anonymous memory that PMD entries must map."""

PATIENCE = 30.0
"""Seconds to wait for the coverage to come back."""


class Server:
    """A redis-server of its own, filled."""

    def __init__(self, directory: Path, *, thp: bool) -> None:
        self.path = directory / "redis"
        directory.mkdir()
        options = ["--port", "0", "--unixsocket", str(self.path), "--save", "", "--dir", str(directory)]
        options += ["--disable-thp", "no" if thp else "yes"]
        self.process = subprocess.Popen(["redis-server", *options], stdout=subprocess.DEVNULL)
        while not self.path.exists():
            time.sleep(0.01)
        self.load(3 * KEYS)

    def call(self, *words: str) -> str:
        """Call redis-cli."""
        command = ["redis-cli", "-s", str(self.path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    @property
    def saving(self) -> bool:
        """Return whether a child saves the data."""
        return "rdb_bgsave_in_progress:1" in self.call("info", "persistence")

    def load(self, requests: int) -> subprocess.Popen[str]:
        """Write at random, and return what writes once it is over."""
        writing = self.begin(requests)
        writing.wait()
        return writing

    def begin(self, requests: int) -> subprocess.Popen[str]:
        """Begin to write at random."""
        command = ["redis-benchmark", "-s", str(self.path), "-t", "set", "-c", str(CLIENTS), "-n", str(requests)]
        command += ["-r", str(KEYS), "-d", str(VALUE), "--csv"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def coverage(self) -> float:
        """Return the share of its anonymous memory that PMD entries map."""
        text = Path(f"/proc/{self.process.pid}/smaps_rollup").read_text()
        huge, anonymous = (int(text.split(f"{name}:")[1].split()[0]) for name in ("AnonHugePages", "Anonymous"))
        return huge / anonymous

    def covered_after(self) -> float:
        """Return the seconds until coverage is what is wanted; infinite if it does not come to that."""
        begin = time.monotonic()
        while self.coverage() < WANTED:
            if time.monotonic() - begin > PATIENCE:
                return float("inf")
            time.sleep(0.02)
        return time.monotonic() - begin

    def saved_under_load(self) -> float:
        """Return the 99th percentile of latency in ms of writes while it saves its data."""
        self.call("bgsave")
        writing = self.load(KEYS // 3)
        while self.saving:
            time.sleep(0.005)
        assert writing.stdout is not None
        heads, values = ([word.strip('"') for word in line.split('","')] for line in writing.stdout.read().split()[-2:])
        return float(dict(zip(heads, values, strict=True))["p99_latency_ms"])


@contextlib.contextmanager
def daemon(pid: int, directory: Path) -> Iterator[None]:
    """Have a daemon work on `pid`."""
    command = [sys.executable, "-m", "mthp", "daemon", "--pid", str(pid), "--orders", "2M", "--cpu", "50%"]
    with subprocess.Popen([*command, "--run-dir", str(directory)], stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()


def main() -> None:
    if os.geteuid() or not shutil.which("redis-server") or not shutil.which("redis-benchmark"):
        print("skipped: needs root, redis-server and redis-benchmark (Debian: redis-server)")
        return
    directory = Path(tempfile.mkdtemp())
    servers = {"THP off": Server(directory / "off", thp=False), "mthp": Server(directory / "mthp", thp=True)}
    tended = servers["mthp"]
    try:
        with daemon(tended.process.pid, directory / "run"):
            print(f"coverage is {tended.coverage():.0%}, and {WANTED:.0%} after {tended.covered_after():.1f} s")
            heads = ("turn", "p99 ms, off", "p99 ms, mthp", "ratio", "off to off", "covered", "back after")
            print("".join(f"{head:>13}" for head in heads))
            rows = []
            for turn in range(TURNS):
                off, with_mthp = servers["THP off"].saved_under_load(), tended.saved_under_load()
                broken, after = tended.coverage(), tended.covered_after()
                again = servers["THP off"].saved_under_load()
                rows.append((2 * with_mthp / (off + again), again / off, after))
                row = [f"{turn}", f"{(off + again) / 2:.2f}", f"{with_mthp:.2f}", *(f"{x:.2f}" for x in rows[-1][:2])]
                print("".join(f"{cell:>13}" for cell in [*row, f"{broken:.0%}", f"{after:.1f} s"]), flush=True)
        ratios, noise, back = zip(*rows, strict=True)
        median = statistics.median
        print(
            f"medians: ratio {median(ratios):.2f}, off to off {median(noise):.2f}; back after {max(back):.1f} s at most"
        )
    finally:
        for server in servers.values():
            server.process.terminate()
            server.process.wait()
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
