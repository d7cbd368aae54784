"""Does it come true? What compare predicts for real programs against what collapse then made, and what that was worth.

Each program is started anew for every setting, loaded, and measured; then ``mthp record``, ``compare`` of the
recording, ``collapse`` of the process and ``report``, all through the command line. Predicted are the share of the
memory that PMD entries map and the memory added (bloat); measured is what the kernel says of it in smaps_rollup, before
and after: AnonHugePages and Anonymous. Of folios below the PMD size smaps tells nothing: the share of memory in large
folios of any size is measured from kpageflags. Throughput and p99 are medians of some runs before and after, with
lowest and highest.

    python bench/bench_prediction.py [--programs redis,sqlite,jvm] [--runs 5] [--keep DIRECTORY]

Programs that are not installed are left out, and said so: redis-server and redis-benchmark (Debian: redis), java
(Debian: default-jdk-headless).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POINTS_AIM = 2.0
"""Percentage points by which a prediction may be wrong."""

SETTINGS: tuple[tuple[str, str, list[str], list[str]], ...] = (
    ("mainline, 2M, 511", "mainline", ["--orders", "2M", "--max-ptes-none", "511"], []),
    ("mainline, 2M, 64", "mainline", ["--orders", "2M", "--max-ptes-none", "64"], []),
    ("mainline, all sizes, 0", "mainline", ["--max-ptes-none", "0"], ["--max-pause", "20ms"]),
    ("no-creep, all sizes, 64", "no-creep", ["--max-ptes-none", "64"], ["--max-pause", "20ms", "--fill"]),
)
"""What is compared and collapsed by: a name, the policy, options of both commands, and more of collapse alone."""


@dataclass(frozen=True)
class Speed:
    """One measurement of a program: operations a second, and the latency that 99 of 100 stay below, in seconds."""

    rate: float
    p99: float


@dataclass(frozen=True)
class Running:
    """A loaded program.

    Attributes:
        pid: of the process whose memory it is.
        measure: takes one measurement.
    """

    pid: int
    measure: Callable[[], Speed]


@contextlib.contextmanager
def redis(directory: Path) -> Iterator[Running]:
    """redis-server with 260 000 values of 4 000 bytes (1 GiB), every eighth deleted; measured by redis-benchmark."""
    socket = directory / "redis.sock"
    options = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--appendonly", "no", "--dir", str(directory)]
    server = subprocess.Popen(["redis-server", *options, "--disable-thp", "no"], stdout=subprocess.DEVNULL)
    client = ["redis-cli", "-s", str(socket)]
    bench = ["redis-benchmark", "-s", str(socket), "-r", "260000", "-d", "4000", "--csv"]
    delete = (
        "for i = 0, 259999 do if (i * 2654435761) % 4294967296 < 536870912 then"
        " redis.call('UNLINK', string.format('key:%012d', i)) end end return 0"
    )
    try:
        while not socket.exists():
            time.sleep(0.05)
        _run([*bench, "-t", "set", "-n", "1300000", "-P", "16"])
        _run([*client, "eval", delete, "0"])
        time.sleep(2)
        _run([*client, "memory", "purge"])
        time.sleep(2)

        def measure() -> Speed:
            fields = _run([*bench, "-t", "get", "-n", "200000", "-c", "8"]).splitlines()[-1].replace('"', "").split(",")
            return Speed(float(fields[1]), float(fields[6]) / 1000)

        yield Running(server.pid, measure)
    finally:
        server.terminate()
        server.wait()


SQLITE = """
import json, random, sqlite3, sys, time
db = sqlite3.connect(":memory:")
db.execute("create table t (k integer primary key, v blob)")
db.executemany("insert into t values (?, ?)", ((k, b"x" * 900) for k in range(500_000)))
db.execute("delete from t where (k / 64) % 9 = 0")
db.commit()
rng = random.Random(1)
print("ready", flush=True)
for line in sys.stdin:
    times = []
    for _ in range(100_000):
        begin = time.perf_counter()
        db.execute("select length(v) from t where k = ?", (rng.randrange(500_000),)).fetchone()
        times.append(time.perf_counter() - begin)
    times.sort()
    print(json.dumps([len(times) / sum(times), times[len(times) * 99 // 100]]), flush=True)
"""


@contextlib.contextmanager
def sqlite(directory: Path) -> Iterator[Running]:
    """SQLite in Python: a table in memory with 500 000 rows of 900 bytes, deleted in part; random lookups."""
    with _asked([sys.executable, "-c", SQLITE]) as running:
        yield running


JAVA = """
public class Heap {
    public static void main(String[] arguments) throws Exception {
        byte[][] values = new byte[500_000][];
        java.util.Random random = new java.util.Random(1);
        for (int round = 0; round < 3; round++)
            for (int at = 0; at < values.length; at++)
                if (random.nextInt(3) == 0 || round == 0) values[at] = new byte[600 + random.nextInt(600)];
        System.gc();
        System.out.println("ready");
        long[] times = new long[200_000];
        long sum = 0;
        while (System.in.read() >= 0) {
            for (int at = 0; at < times.length; at++) {
                long begin = System.nanoTime();
                byte[] value = values[random.nextInt(values.length)];
                sum += value[random.nextInt(value.length)];
                times[at] = System.nanoTime() - begin;
            }
            double total = java.util.Arrays.stream(times).sum() / 1e9;
            java.util.Arrays.sort(times);
            System.out.println("[" + times.length / total + ", " + times[times.length * 99 / 100] / 1e9 + "]");
        }
        System.err.println(sum);
    }
}
"""


@contextlib.contextmanager
def jvm(directory: Path) -> Iterator[Running]:
    """A Java heap of 1 GiB with 500 000 arrays of 600 to 1 200 bytes, a part replaced; random reads."""
    source = directory / "Heap.java"
    source.write_text(JAVA)
    command = ["java", "-Xms1g", "-Xmx1g", "-XX:+UseSerialGC", "-XX:-UseTransparentHugePages", str(source)]
    with _asked(command) as running:
        yield running


PROGRAMS: dict[str, tuple[Callable[[Path], contextlib.AbstractContextManager[Running]], tuple[str, ...]]] = {
    "redis": (redis, ("redis-server", "redis-benchmark", "redis-cli")),
    "sqlite": (sqlite, ()),
    "jvm": (jvm, ("java",)),
}


@contextlib.contextmanager
def _asked(command: list[str]) -> Iterator[Running]:
    """A program that says "ready", and then takes a measurement for every line that it is sent."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout
        assert stdout.readline() == "ready\n"

        def measure() -> Speed:
            stdin.write("\n")
            stdin.flush()
            return Speed(*json.loads(stdout.readline()))

        yield Running(process.pid, measure)
        stdin.close()


def _run(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def mthp(*arguments: object) -> dict[str, Any]:
    """One command of mthp, and its JSON; collapse may do only a part."""
    command = [sys.executable, "-m", "mthp", *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode > 1:
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@dataclass(frozen=True)
class Memory:
    """What smaps_rollup says, in bytes."""

    anonymous: int
    huge: int

    @property
    def coverage(self) -> float:
        return self.huge / self.anonymous


def memory_of(pid: int) -> Memory:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    values = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
    return Memory(values["Anonymous"], values["AnonHugePages"])


@dataclass(frozen=True)
class Result:
    """Predicted and measured, for one program and setting; shares of 1."""

    coverage: tuple[float, float]
    large: tuple[float, float]
    bloat: tuple[float, float]
    before: list[Speed]
    after: list[Speed]

    @property
    def worst(self) -> float:
        """The larger error, in percentage points."""
        return 100 * max(abs(predicted - measured) for predicted, measured in (self.coverage, self.large, self.bloat))


def judge(name: str, policy: str, options: list[str], more: list[str], runs: int, directory: Path) -> Result:
    """Predict, collapse and measure one program under one setting."""
    start = PROGRAMS[name][0]
    with start(directory) as running:
        before = [running.measure() for _ in range(runs)]
        recording = directory / f"{name}.recording"
        mthp("record", running.pid, "-o", recording, "--force", "--every", "500ms", "--for", "1200ms", "--cpu", "100%")
        [_, predicted] = mthp("compare", recording, "--policies", policy, *options)["rows"]
        was = memory_of(running.pid)
        mthp("collapse", running.pid, "--policy", policy, *options, *more)
        now = memory_of(running.pid)
        large = mthp("compare", running.pid, "--policies", "pmd-only", "--orders", "2M")["rows"][0]["large_coverage"]
        mthp("report", recording, "-o", directory / f"{name}.html", "--force")
        after = [running.measure() for _ in range(runs)]
    huge = predicted["huge_coverage"] * predicted["resident_bytes"]
    grown = (now.anonymous - was.anonymous) / was.anonymous
    return Result(
        # compare speaks of the PMD ranges that may be collapsed, smaps of all anonymous memory.
        coverage=(huge / (was.anonymous + predicted["bloat_bytes"]), now.coverage),
        large=(predicted["large_coverage"], large),
        bloat=(predicted["bloat_bytes"] / was.anonymous, grown),
        before=before,
        after=after,
    )


def spread(values: list[float], factor: float = 1.0) -> str:
    """Median, lowest and highest."""
    scaled = [value * factor for value in values]
    return f"{statistics.median(scaled):,.4g} ({min(scaled):,.4g} to {max(scaled):,.4g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", default="redis,sqlite,jvm", help="which, separated by commas")
    parser.add_argument("--runs", type=int, default=3, help="measurements of speed before and after")
    parser.add_argument("--keep", type=Path, help="a directory that recordings and reports stay in")
    options = parser.parse_args()
    heads = ["program", "setting", "2M coverage: predicted, measured", "large folios", "bloat", "worst error"]
    heads += ["operations/s before", "after", "p99 ms before", "after"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    missed = 0
    with contextlib.ExitStack() as stack:
        place = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        place.mkdir(exist_ok=True)
        for name in options.programs.split(","):
            if lacking := [program for program in PROGRAMS[name][1] if shutil.which(program) is None]:
                print(f"{name} is left out: {', '.join(lacking)} is not installed", file=sys.stderr)
                continue
            for setting, policy, arguments, more in SETTINGS:
                result = judge(name, policy, arguments, more, options.runs, place)
                missed += result.worst > POINTS_AIM
                cells = [
                    name,
                    setting,
                    *(f"{a:.1%}, {b:.1%}" for a, b in (result.coverage, result.large, result.bloat)),
                ]
                cells.append(f"{result.worst:.2f} points, {'ok' if result.worst <= POINTS_AIM else 'MISSED'}")
                cells += [spread([one.rate for one in result.before]), spread([one.rate for one in result.after])]
                cells += [spread([one.p99 for one in side], 1000) for side in (result.before, result.after)]
                print(f"| {' | '.join(cells)} |", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
