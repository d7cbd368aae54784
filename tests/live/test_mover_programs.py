"""Collapse unmodified programs while they work: redis-server, PostgreSQL, a JVM, CPython.

Each must return the known results, and go on serving. A program that is not installed is skipped
(Debian: redis-server, postgresql and postgresql-contrib, openjdk-17-jdk-headless).
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest

from mthp.errors import MthpError, TargetVanishedError, UnsupportedError
from mthp.linux.live import LiveAddressSpace, open_live
from mthp.means import Means
from mthp.movechecks import refuse_vma
from mthp.ptes import Block, Pte
from mthp.results import ScanResult
from waiting import FACTOR, PATIENCE, wait_for

pytestmark = [
    pytest.mark.usefixtures("no_sizes"),
    pytest.mark.live,
    pytest.mark.slow,
    pytest.mark.requires("root", "mthp", "4k-pages", "pagemap_scan"),
]

MEANS = Means(mechanism="move", max_pause=0.003 * FACTOR, pause_share=0.5, verify=True)
AT_ONCE = 64
SECONDS = float(os.environ.get("MTHP_TEST_SECONDS", "3"))
"""How long each program is worked on."""


def program(name: str) -> str:
    """Return the path of a program; skips the test where it is not installed."""
    where = shutil.which(name, path=os.pathsep.join([os.defpath, "/usr/sbin", "/sbin"]))
    if where is None:
        pytest.skip(f"needs {name}")
    return where


def movable(space: LiveAddressSpace, order: int) -> list[Block]:
    """Blocks of whole, small pages in mappings that may be moved."""
    size = space.geometry.size_of(order)
    found: list[Block] = []
    for vma in space.vmas():
        start, end = -(-vma.start // size) * size, vma.end // size * size
        if end <= start or refuse_vma(vma) is not None:
            continue
        columns = space.read([(start, end)])
        small = (columns.state & np.uint16(Pte.PRESENT | Pte.ZERO | Pte.SHARED)) == np.uint16(Pte.PRESENT)
        small &= columns.folio_order < order
        whole = np.flatnonzero(small.reshape(-1, 1 << order).all(axis=1))
        found += [(start + block * size, order) for block in whole.tolist()]
    return found


def collapse_while(
    pids: Callable[[], Sequence[int]], order: int, working: Callable[[], bool], *, lasts: bool = False
) -> int:
    """Collapse blocks of `pids`, for as long as they work: how many became folios of `order`.

    A program that `lasts` works for longer if need be, until there is one.
    """
    rng = np.random.default_rng(1)
    results: Counter[str] = Counter()
    begun = time.monotonic()
    while working() or (lasts and not results[ScanResult.SUCCEED.name] and time.monotonic() < begun + PATIENCE):
        for pid in pids():
            # Gone, or ended and not yet waited for.
            with contextlib.suppress(TargetVanishedError, UnsupportedError), open_live(pid) as space:
                blocks = movable(space, order)
                chosen = [blocks[at] for at in rng.permutation(len(blocks))[:AT_ONCE].tolist()]
                if not chosen:
                    continue
                try:
                    outcomes = space.collapse_blocks(chosen, MEANS)
                except MthpError as error:
                    results[error.message.split(")")[-1]] += 1
                    continue
                results.update(outcome.result.name if not outcome.reason else outcome.reason for outcome in outcomes)
    print(dict(results))
    return results[ScanResult.SUCCEED.name]


@contextlib.contextmanager
def running(command: Sequence[str | Path], **options: object) -> Iterator[subprocess.Popen[str]]:
    """A process for as long as the ``with`` block lasts."""
    process = subprocess.Popen([*map(str, command)], text=True, **options)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(PATIENCE)
        if process.stdout is not None:
            process.stdout.close()


def for_seconds(seconds: float) -> Callable[[], bool]:
    """Says whether there is time left."""
    over = threading.Event()
    timer = threading.Timer(seconds, over.set)
    timer.daemon = True
    timer.start()
    return lambda: not over.is_set()


# --- redis-server -----------------------------------------------------------------------------------------------------

KEYS = 20_000


class Redis:
    """Talks to a server; every value is known by its key."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(PATIENCE)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rb")

    @staticmethod
    def value(key: int) -> bytes:
        return f"{key}:".encode() * (8 + key % 60)

    def _send(self, *words: bytes) -> None:
        parts = [b"*%d\r\n" % len(words), *(b"$%d\r\n%s\r\n" % (len(word), word) for word in words)]
        self._socket.sendall(b"".join(parts))

    def fill(self) -> None:
        for key in range(KEYS):
            self._send(b"SET", b"mine:%d" % key, self.value(key))
            assert self._file.readline() == b"+OK\r\n"

    def wrong(self) -> int:
        """Return the number of values that differ from those set."""
        wrong = 0
        for key in range(KEYS):
            self._send(b"GET", b"mine:%d" % key)
            expected = self.value(key)
            wrong += self._file.readline() != b"$%d\r\n" % len(expected)
            wrong += self._file.readline() != expected + b"\r\n"
        return wrong

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def test_redis(tmp_path: Path) -> None:
    path = tmp_path / "redis"
    # By default it switches THP off for itself.
    options = ["--port", "0", "--unixsocket", str(path), "--save", "", "--disable-thp", "no", "--dir", str(tmp_path)]
    benchmark = program("redis-benchmark")
    with running([program("redis-server"), *options], stdout=subprocess.DEVNULL) as server:
        assert wait_for(path.exists)
        client = Redis(path)
        client.fill()
        load = [
            benchmark,
            "-s",
            str(path),
            *["-c", "10", "-n", "100000000", "-r", "50000", "-d", "200", "-t", "set,get", "-q"],
        ]
        with running(load, stdout=subprocess.DEVNULL) as clients:
            made = collapse_while(lambda: [server.pid], 4, for_seconds(SECONDS), lasts=True)
            assert clients.poll() is None
        assert made > 0
        assert client.wrong() == 0
        client.close()
        assert server.poll() is None


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


def _postgres_programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/pgbench"))
    if not found:
        pytest.skip("needs PostgreSQL and pgbench below /usr/lib/postgresql")
    return found[-1].parent


def test_postgresql_under_pgbench(tmp_path: Path) -> None:
    programs = _postgres_programs()
    try:
        user = pwd.getpwnam("postgres")
    except KeyError:
        pytest.skip("needs the user postgres: the server does not run as root")
    # The server's user has to come through to its data.
    home = Path("/var/tmp") / f"mthp-tests-postgres-{os.getpid()}"
    home.mkdir(mode=0o700)
    os.chown(home, user.pw_uid, user.pw_gid)
    as_user = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": [], "cwd": home, "text": True}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}

    def run(name: str, *words: str, **options: object) -> subprocess.CompletedProcess[str]:
        command = [str(programs / name), *words]
        return subprocess.run(command, check=True, **(as_user | options))  # type: ignore[call-overload, no-any-return]

    def ask(query: str) -> str:
        words = ("-h", str(home), "-At", "-c", query, "postgres")
        return run("psql", *words, stdout=subprocess.PIPE).stdout.strip()

    try:
        run("initdb", "-D", str(home / "data"), "-A", "trust", "--no-sync", **quiet)
        options = ["-D", str(home / "data"), "-k", str(home), "-c", "listen_addresses=", "-c", "fsync=off"]
        server_options = {key: value for key, value in as_user.items() if key != "text"} | quiet
        with running([str(programs / "postgres"), *options], **server_options) as server:
            assert wait_for((home / ".s.PGSQL.5432").exists)
            ready = [str(programs / "pg_isready"), "-q", "-h", str(home)]
            assert wait_for(lambda: not subprocess.run(ready, check=False).returncode)
            run("pgbench", "-h", str(home), "-i", "-s", "1", "postgres", **quiet)

            def backends() -> list[int]:
                children = Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()
                return [server.pid, *map(int, children)]

            load = [str(programs / "pgbench"), "-h", str(home), "-c", "4", "-T", str(int(SECONDS) + 1), "postgres"]
            with running(load, **server_options) as clients:
                made = collapse_while(backends, 2, lambda: clients.poll() is None)
                assert clients.returncode == 0
            assert made > 0
            sums = [f"sum({name[0]}balance) FROM pgbench_{name}s" for name in ("account", "teller")]
            sums = [ask(f"SELECT {text}") for text in (*sums, "sum(bbalance) FROM pgbench_branches")]
            sums.append(ask("SELECT sum(delta) FROM pgbench_history"))
            assert len(set(sums)) == 1
            assert int(ask("SELECT count(*) FROM pgbench_history")) > 0
            assert ask("SELECT count(*), count(DISTINCT aid) FROM pgbench_accounts") == "100000|100000"
    finally:
        shutil.rmtree(home, ignore_errors=True)


# --- A JVM, and CPython -----------------------------------------------------------------------------------------------

JAVA = """
import java.util.*;
import java.util.concurrent.*;

public class Churn {
    static long part(long seed, int turns) {
        Random random = new Random(seed);
        Map<Long, byte[]> map = new HashMap<>();
        long sum = 0;
        for (int turn = 0; turn < turns; turn++) {
            long key = random.nextInt(5000);
            byte[] value = map.get(key);
            if (value != null)
                for (byte b : value)
                    sum = sum * 31 + b;
            byte[] fresh = new byte[100 + random.nextInt(900)];
            random.nextBytes(fresh);
            map.put(key, fresh);
        }
        return sum;
    }

    public static void main(String[] words) throws Exception {
        long deadline = System.nanoTime() + Long.parseLong(words[0]) * 1000000;
        List<Long> expected = null;
        ExecutorService pool = Executors.newFixedThreadPool(4);
        int rounds = 0;
        do {
            List<Callable<Long>> parts = new ArrayList<>();
            for (int i = 0; i < 4; i++) {
                final long seed = i;
                parts.add(() -> part(seed, 20000));
            }
            List<Long> sums = new ArrayList<>();
            for (Future<Long> future : pool.invokeAll(parts))
                sums.add(future.get());
            if (expected == null)
                System.out.println("ready");
            else if (!expected.equals(sums))
                System.exit(9);
            expected = sums;
            rounds++;
        } while (System.nanoTime() < deadline || rounds < 3);
        pool.shutdown();
        System.out.println(expected.hashCode());
    }
}
"""

PYTHON = """
import random, sys, threading, time, zlib
deadline = time.monotonic() + float(sys.argv[1]) / 1000
def part(seed):
    rng = random.Random(seed)
    table, total = {}, 0
    for turn in range(6000):
        key = rng.randrange(3000)
        total = zlib.crc32(table.get(key, b""), total)
        table[key] = rng.randbytes(100 + rng.randrange(900))
    return total
def work(seed, results):
    results[seed] = part(seed)
expected, rounds = None, 0
while time.monotonic() < deadline or rounds < 3:
    results = {}
    threads = [threading.Thread(target=work, args=(seed, results)) for seed in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    if expected is None:
        print("ready", flush=True)
    elif results != expected:
        sys.exit(9)
    expected = results
    rounds += 1
print(sorted(expected.items()), flush=True)
"""


def _computes(command: Sequence[str | Path]) -> None:
    """The program has the same result when it is collapsed meanwhile, and its own checks pass."""
    alone = subprocess.run([*map(str, command), "0"], check=True, capture_output=True, text=True).stdout
    with running([*command, str(int(SECONDS * 1000))], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        made = collapse_while(lambda: [process.pid], 4, lambda: process.poll() is None)
        assert process.wait(PATIENCE) == 0
        assert "ready\n" + process.stdout.read() == alone
        assert made > 0


def test_a_jvm(tmp_path: Path) -> None:
    java = program("java")
    source = tmp_path / "Churn.java"
    source.write_text(JAVA)
    try:
        subprocess.run([program("javac"), "-d", tmp_path, source], check=True, capture_output=True)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"needs javac: {error.stderr!r}")
    _computes([java, "-Xmx96m", "-XX:+UseSerialGC", "-cp", tmp_path, "Churn"])


def test_cpython_with_threads() -> None:
    _computes([sys.executable, "-c", PYTHON])
