"""Programs of the distribution, loaded with about 1 GiB and measured, for bench_prediction."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Speed:
    """One measurement of a program.

    Attributes:
        rate: operations a second.
        p99: the latency that 99 of 100 stay below, in seconds.
        operations: how many were measured.
        cost: processor time of the program for each, in seconds; unlike the others hardly moved by what else runs.
    """

    rate: float
    p99: float
    operations: int
    cost: float = 0.0


@dataclass(frozen=True)
class Running:
    """A loaded program.

    Attributes:
        pid: the process that has the memory.
        operate: takes one measurement, without the processor time.
    """

    pid: int
    operate: Callable[[], Speed]

    def measure(self) -> Speed:
        """Take one measurement."""
        before = self._processor_time()
        speed = self.operate()
        return replace(speed, cost=(self._processor_time() - before) / speed.operations)

    def _processor_time(self) -> float:
        """Of all its threads, in seconds."""
        threads = Path(f"/proc/{self.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


GETS = 200_000
"""Requests of one measurement of redis."""


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
            fields = (
                _run([*bench, "-t", "get", "-n", str(GETS), "-c", "8"]).splitlines()[-1].replace('"', "").split(",")
            )
            return Speed(float(fields[1]), float(fields[6]) / 1000, GETS)

        yield Running(server.pid, measure)
    finally:
        server.terminate()
        server.wait()


PGBENCH = r"""
\if :loaded = 0
create temp table t as select k, repeat(md5(k::text), 28) as v from generate_series(1, 1000000) k;
create index on t (k);
\set loaded 1
\endif
\set k random(1, 1000000)
select length(v) from t where k = :k;
"""


@contextlib.contextmanager
def postgres(directory: Path) -> Iterator[Running]:
    """A session of PostgreSQL with 1 000 000 rows of 900 bytes in a temporary table; pgbench looks up random ones.

    A temporary table is in memory of the session (``temp_buffers``). The shared buffers are shared memory, for which
    PostgreSQL chooses the page size by ``huge_pages``. The session must be the same before and after, so pgbench runs
    all the time, and is stopped between measurements.
    """
    user = pwd.getpwnam("postgres")
    tools = _postgres_tools()[-1]
    # The server does not run as root, and its user cannot come through to `directory`.
    home = Path(tempfile.mkdtemp(prefix="mthp-bench-", dir="/var/tmp"))
    os.chown(home, user.pw_uid, user.pw_gid)
    (home / "lookups.sql").write_text(PGBENCH)
    away: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": home}
    away |= {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    subprocess.run([tools / "initdb", "-D", home / "data", "-A", "trust", "--no-sync"], check=True, **away)
    options = ["-c", "listen_addresses=", "-c", "fsync=off", "-c", "temp_buffers=1200MB"]
    server = subprocess.Popen([tools / "postgres", "-D", home / "data", "-k", home, *options], **away)
    try:
        while subprocess.run([tools / "pg_isready", "-q", "-h", home], check=False).returncode:
            time.sleep(0.1)
        load = [
            "-h",
            str(home),
            "-c",
            "1",
            "-n",
            "-T",
            "86400",
            "-D",
            "loaded=0",
            "-f",
            str(home / "lookups.sql"),
            "-l",
        ]
        with subprocess.Popen([str(tools / "pgbench"), *load, "postgres"], **away) as client:
            try:
                log = home / f"pgbench_log.{client.pid}"
                while not (log.exists() and log.stat().st_size):
                    time.sleep(0.1)
                client.send_signal(signal.SIGSTOP)
                yield Running(_session(server.pid), lambda: _pgbench(client, log))
            finally:
                client.kill()
    finally:
        server.send_signal(signal.SIGINT)
        server.wait()
        shutil.rmtree(home)


def _postgres_tools() -> list[Path]:
    """Directories with PostgreSQL's programs, as Debian has them, the newest last."""
    return sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def _session(postmaster: int) -> int:
    """Return the server process of pgbench's session: the one that has the most memory of its own."""
    children = Path(f"/proc/{postmaster}/task/{postmaster}/children").read_text().split()
    return max(map(int, children), key=lambda pid: memory_of(pid).anonymous)


def _pgbench(client: subprocess.Popen[Any], log: Path, seconds: float = 3.0) -> Speed:
    """Let pgbench go on for some time; its log has the latency of each transaction, in microseconds."""
    begin = log.stat().st_size
    client.send_signal(signal.SIGCONT)
    time.sleep(seconds)
    client.send_signal(signal.SIGSTOP)
    # The first line is cut off, and so is the last; one transaction lasted while all was stopped.
    lines = log.read_bytes()[begin:].split(b"\n")[1:-1]
    latencies = np.array([int(line.split()[2]) for line in lines]) / 1e6
    latencies = latencies[latencies < seconds]
    return Speed(len(latencies) / float(latencies.sum()), float(np.percentile(latencies, 99)), len(latencies))


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
    print(json.dumps([len(times) / sum(times), times[len(times) * 99 // 100], len(times)]), flush=True)
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
            double p99 = times[times.length * 99 / 100] / 1e9;
            System.out.println("[" + times.length / total + ", " + p99 + ", " + times.length + "]");
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


@dataclass(frozen=True)
class Memory:
    """What smaps_rollup says, in bytes."""

    rss: int
    anonymous: int
    huge: int

    @property
    def coverage(self) -> float:
        """Return the share of the anonymous memory that PMD entries map."""
        return self.huge / self.anonymous


def memory_of(pid: int) -> Memory:
    """What the kernel says of a process now."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    values = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines}
    return Memory(values["Rss"], values["Anonymous"], values["AnonHugePages"])


PROGRAMS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Running]]] = {
    "redis": redis,
    "postgres": postgres,
    "jvm": jvm,
    "sqlite": sqlite,
}
"""Each takes a directory to work in."""

_NEEDS = {"redis": "redis-server", "postgres": "postgres", "jvm": "java", "sqlite": "python3"}


def lacking(name: str) -> str:
    """Return the program that `name` needs and that is not installed; ``""`` if it is."""
    needed = _NEEDS[name]
    return "" if shutil.which(needed) or (_postgres_tools() and needed == "postgres") else needed
