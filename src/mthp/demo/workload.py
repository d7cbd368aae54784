"""The process that `mthp demo` works on: an in-memory SQLite database, run as ``python -m mthp.demo.workload``.

A realistic heap
----------------
One large array would be easy to collapse and would prove nothing. This heap is made by a library that knows nothing of
huge pages:

- **Growth.** Documents of 10 000 to 16 000 bytes go into a table in small batches. SQLite takes every database page (64
  KiB) from malloc, so the heap grows by brk, one page after the other, with the headers between.
- **Changes.** A part of the documents is deleted and a part rewritten at another length: pages split, move and lie on
  the free list. They stay resident, as they do in a real service.
- **Holes.** A second database, of short-lived sessions, grows in between, in runs of very different length. At the end
  it is dropped, and malloc_trim(3) returns its whole pages: none PTEs between the documents, a few in some PMD
  ranges, many in others, as a service has them after its peak hour.

A lookup is the uniformly random read of one document's last column by primary key. It walks the b-tree and steps over
the document to the column behind it: a handful of cache lines, each in a different page, so lookups are sensitive to
the size of pages. One SQL statement does a thousand lookups, so nearly all the time is SQLite's and not Python's. All
of it follows a fixed seed.

The protocol
------------
One JSON object a line. On stdout first ``{"event": "progress", "done_bytes", "total_bytes", "phase"}`` several times,
then ``{"event": "ready"}``. From then on every line on stdin has one line on stdout as its answer: ``{"cmd": "measure",
"seconds": 2}``, ``{"cmd": "verify"}``, ``{"cmd": "quit"}``, and ``{"cmd": "collapse"}``, by which the process collapses
its own memory, without privileges. After ``{"cmd": "serve"}`` and its answer the process looks up single documents
until the next line comes, whatever it is, and answers with their durations: the delay that its thread saw meanwhile.
The answer to an invalid request is ``{"error": ...}``. The end of stdin ends the process, and so does the end of the
thread that started it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import select
import signal
import sqlite3
import statistics
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

# include/uapi/linux/prctl.h
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15
PR_SET_THP_DISABLE = 41
PR_GET_THP_DISABLE = 42

# malloc.h of the GNU C library; the threshold is the largest that mallopt(3) accepts on 64-bit machines.
M_MMAP_THRESHOLD = -3
LARGEST_MMAP_THRESHOLD = 32 << 20

COMM = "mthp-demo"
SEED = 20_240_117

DATABASE_PAGE_BYTES = 65536
LONGEST_BODY = 20_000
DOCUMENTS_PER_STEP = 160
"""Documents inserted before sessions follow, about 2 MiB: the grain at which both alternate in the heap."""
SESSION_BYTES = 2180
"""Bytes of the heap for one session: half a database page of 4 KiB with its headers."""
SESSION_RUNS = ((0, 6), (128 << 10, 4), (512 << 10, 4), (2 << 20, 2), (4 << 20, 1))
"""Lengths in bytes of the runs of sessions, each with its weight; on average a third of the documents beside them."""

LOOKUPS_PER_BATCH = 1024
CHECKED_BATCHES = 8
"""Batches in the checksum of a measurement: fixed, so that it does not depend on the machine's speed."""

INSERT_DOCUMENTS = """
    WITH RECURSIVE counter(n) AS (SELECT :first UNION ALL SELECT n + 1 FROM counter WHERE n < :last)
    INSERT INTO document
    SELECT n, n % 16, substr(:pool, 1 + (n * 7919) % :span, 10000 + (n * 31) % 6001), (n * 2654435761) % 1000003
    FROM counter"""
INSERT_SESSIONS = """
    WITH RECURSIVE counter(n) AS (SELECT :first UNION ALL SELECT n + 1 FROM counter WHERE n < :last)
    INSERT INTO cache.session SELECT n, substr(:pool, 1 + (n * 104729) % :span, 1960) FROM counter"""
REWRITE_DOCUMENTS = f"UPDATE document SET body = substr(:pool, 1 + id % :span, {LONGEST_BODY}) WHERE id % 50 = 11"
# SQLite does not reorder a CROSS JOIN, so each line of `probe` is looked up in `document` (its query optimizer
# overview).
LOOK_UP = """
    SELECT count(*), total(document.rank)
    FROM probe CROSS JOIN document ON document.id = 1 + (probe.r * :factor + :shift) % :documents"""
LOOK_UP_ONE = "SELECT rank FROM document WHERE id = ?"

BUCKETS_PER_DOUBLING = 16
"""Buckets for durations of single lookups, for each factor of 2: a resolution of 6%."""

Report = Callable[[int, int, str], None]


class Database:
    """The database and its operations.

    Raises:
        MemoryError: from every method, where the process may not have more memory.
    """

    def __init__(self) -> None:
        self._db = sqlite3.connect(":memory:", isolation_level=None)
        self._pool = random.Random(SEED).randbytes(1 << 20)
        self._documents = 0
        self._sessions = 0
        self._db.create_function("crc32", 1, zlib.crc32, deterministic=True)
        self._db.executescript(f"""
            PRAGMA page_size = {DATABASE_PAGE_BYTES};
            PRAGMA journal_mode = OFF;
            PRAGMA secure_delete = OFF;
            PRAGMA temp_store = MEMORY;
            ATTACH ':memory:' AS cache;
            PRAGMA cache.page_size = 4096;
            PRAGMA cache.journal_mode = OFF;
            CREATE TABLE document (id INTEGER PRIMARY KEY, kind INTEGER, body BLOB, rank INTEGER);
            CREATE TABLE cache.session (id INTEGER PRIMARY KEY, state BLOB);
            CREATE TEMP TABLE probe (r INTEGER);""")
        probes = random.Random(SEED + 1)
        self._db.executemany(
            "INSERT INTO probe VALUES (?)", ((probes.getrandbits(31),) for _ in range(LOOKUPS_PER_BATCH))
        )

    def grow(self, size: int, report: Report) -> None:
        """Fill the database, change it, and leave holes.

        Args:
            size: anonymous memory that the process is to have at the end, in bytes; met within a few percent.
            report: called with the bytes done, the bytes in all, and the name of the phase.
        """
        runs = random.Random(SEED + 2)
        lengths, weights = zip(*SESSION_RUNS, strict=True)
        # The sessions are dropped at the end, so the heap has to grow past its size by theirs.
        while (done := anonymous_bytes() - self._sessions * SESSION_BYTES) < size:
            report(done, size, "growing")
            self._documents = self._insert(INSERT_DOCUMENTS, self._documents, DOCUMENTS_PER_STEP)
            (length,) = runs.choices(lengths, weights)
            self._sessions = self._insert(INSERT_SESSIONS, self._sessions, length // SESSION_BYTES)
        report(size, size, "changing")
        self._db.execute("DELETE FROM document WHERE id % 50 = 7")
        self._db.execute(REWRITE_DOCUMENTS, self._source())
        report(size, size, "trimming")
        self._db.execute("DETACH cache")
        give_back_free_memory()

    def measure(self, seconds: float) -> dict[str, float]:
        """Look up documents for `seconds`.

        Returns:
            `lookups`; `seconds` by the clock; `lookups_per_s`, the median over the batches, with the quartiles `low`
                and `high`; `checksum` of the first batches, which are the same in every measurement. The rates are per
                second of processor time, so that other programs on the machine do not look like an effect.
        """
        rng = random.Random(SEED + 3)
        rates: list[float] = []
        checksum = 0
        self._look_up(random.Random(SEED + 4))  # not counted: it brings the code and the b-tree's root to the caches
        start = time.perf_counter()
        while len(rates) < CHECKED_BATCHES or time.perf_counter() - start < seconds:
            begin = time.thread_time()
            found = self._look_up(rng)
            rates.append(LOOKUPS_PER_BATCH / (time.thread_time() - begin))
            if len(rates) <= CHECKED_BATCHES:
                checksum = zlib.crc32(repr(found).encode(), checksum)
        low, median, high = statistics.quantiles(rates, n=4)
        return {
            "lookups": len(rates) * LOOKUPS_PER_BATCH,
            "seconds": time.perf_counter() - start,
            "lookups_per_s": median,
            "low": low,
            "high": high,
            "checksum": checksum,
        }

    def serve(self, is_over: Callable[[], bool]) -> dict[str, float]:
        """Look up single documents until `is_over` returns True.

        Args:
            is_over: called between lookups, every few microseconds.

        Returns:
            `count` of the lookups; the duration of one in seconds: `p50`, `p99`, `max`, and `total`.
        """
        rng, counts, longest, total = random.Random(SEED + 5), [0] * 64 * BUCKETS_PER_DOUBLING, 0, 0
        while not is_over():
            key = (1 + rng.randrange(self._documents),)
            begin = time.perf_counter_ns()
            self._db.execute(LOOK_UP_ONE, key).fetchone()
            taken = time.perf_counter_ns() - begin
            # Durations are counted, because a list of them would grow in the heap that is being measured.
            counts[_bucket(taken)] += 1
            longest, total = max(longest, taken), total + taken
        return {
            "count": sum(counts),
            "p50": _percentile(counts, 0.5),
            "p99": _percentile(counts, 0.99),
            "max": longest / 1e9,
            "total": total / 1e9,
        }

    def verify(self) -> dict[str, int | bool]:
        """Read every byte of every document, and let SQLite check its own structures (PRAGMA integrity_check)."""
        rows, total, crc = self._db.execute(
            "SELECT count(*), sum(rank), sum(crc32(body) * (1 + id % 127)) FROM document"
        ).fetchone()
        (verdict,) = self._db.execute("PRAGMA integrity_check(1)").fetchone()
        return {"rows": rows, "total": total, "crc": crc, "intact": verdict == "ok"}

    def _insert(self, statement: str, done: int, count: int) -> int:
        if count:
            self._db.execute(statement, {"first": done + 1, "last": done + count, **self._source()})
        return done + count

    def _source(self) -> dict[str, object]:
        """Return the source of contents in SQL: slices of one random string."""
        # SQLite cuts them in C, and unlike randomblob() they follow the seed.
        return {"pool": self._pool, "span": len(self._pool) - LONGEST_BODY}

    def _look_up(self, rng: random.Random) -> tuple[int, float]:
        """Look up one batch of keys: fixed random numbers, mapped to keys by a new random line for each batch."""
        values = {"factor": rng.getrandbits(20) | 1, "shift": rng.getrandbits(31), "documents": self._documents}
        found, ranks = self._db.execute(LOOK_UP, values).fetchone()
        return found, ranks


def _bucket(nanoseconds: int) -> int:
    """Return the number of the bucket for a duration."""
    # The five highest bits are 16 to 31, so the 16 buckets of a doubling follow those of the one before.
    doublings = max(0, nanoseconds.bit_length() - 5)
    return min(doublings * BUCKETS_PER_DOUBLING + (nanoseconds >> doublings), 64 * BUCKETS_PER_DOUBLING - 1)


def _percentile(counts: list[int], share: float) -> float:
    """Return the duration in seconds that `share` of the counted ones do not exceed, by its bucket's end."""
    left = share * sum(counts)
    for bucket, count in enumerate(counts):
        left -= count
        if left <= 0 and count:
            doublings = max(0, bucket // BUCKETS_PER_DOUBLING - 1)
            return ((bucket - doublings * BUCKETS_PER_DOUBLING + 1) << doublings) / 1e9
    return 0.0


def collapse_own_memory() -> dict[str, object]:
    """Collapse this process to huge pages by the kernel's call for one's own memory.

    Returns:
        `elapsed`, in seconds; or `error`.
    """
    # Imported here, so that where the demo collapses from outside, this process has only its own library.
    from mthp.api import collapse
    from mthp.errors import MthpError

    try:
        return {"elapsed": collapse("self", mechanism="madvise", max_bloat=None).elapsed}
    except MthpError as error:
        return {"error": error.message}


def anonymous_bytes() -> int:
    """Return the anonymous memory of this process: resident less shared of ``/proc/self/statm`` (proc_pid_statm(5))."""
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGESIZE")


def keep_the_heap_in_one_piece() -> None:
    """Let malloc serve large requests from the heap as well.

    SQLite's table of pages grows to some MiB, and every lookup reads it. In a mapping of its own it would lie across
    borders of PMD ranges, where nothing can be collapsed. Other C libraries than GNU's lack this call.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)


def give_back_free_memory() -> None:
    """Return free whole pages to the kernel, in the middle of the heap too: malloc_trim(3), where it exists."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def prctl(option: int, argument: int | bytes = 0) -> int:
    """Call prctl(2) with one argument, and return its result.

    Raises:
        OSError: the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    value = ctypes.c_char_p(argument) if isinstance(argument, bytes) else ctypes.c_ulong(argument)
    zero = ctypes.c_ulong(0)
    result: int = libc.prctl(option, value, zero, zero, zero)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")
    return result


def depend_on(parent: int) -> None:
    """End together with the process that started this one, and leave Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before PR_SET_PDEATHSIG was set
        sys.exit(1)


def have_small_pages_only() -> None:
    """Return with PR_SET_THP_DISABLE set since execve(2), by executing this program again if necessary."""
    if not prctl(PR_GET_THP_DISABLE):
        prctl(PR_SET_THP_DISABLE, 1)
        # The interpreter may have a huge page already: execve(2) drops that memory, and keeps the flag.
        os.execv(sys.executable, sys.orig_argv)


def say(message: dict[str, object]) -> None:
    """Write one line of the protocol."""
    print(json.dumps(message), flush=True)


def progress_reporter(interval: float = 0.1) -> Report:
    """Return a `Report` that writes progress events: at the start of each phase, and every `interval` seconds."""
    last_phase, last_time = "", 0.0

    def report(done: int, total: int, phase: str) -> None:
        nonlocal last_phase, last_time
        now = time.monotonic()
        if phase != last_phase or now - last_time >= interval:
            last_phase, last_time = phase, now
            say({"event": "progress", "done_bytes": done, "total_bytes": total, "phase": phase})

    return report


def answer(database: Database, line: str) -> dict[str, object]:
    """Return the answer to one request."""
    try:
        request = json.loads(line)
        command = request["cmd"]
        seconds = float(request.get("seconds", 1))
    except (ValueError, TypeError, KeyError, AttributeError):
        return {"error": f"not a request: {line.strip()[:200]!r}"}
    if command == "measure":
        return {**database.measure(seconds)}
    if command == "verify":
        return {**database.verify()}
    if command == "serve":
        say({"event": "serving"})
        poll = select.poll()
        poll.register(sys.stdin, select.POLLIN)
        served = database.serve(lambda: bool(poll.poll(0)))
        sys.stdin.readline()
        return {**served}
    if command == "collapse":
        return collapse_own_memory()
    if command == "quit":
        return {}
    return {"error": f"unknown command: {command!r}"}


def main() -> None:
    """Grow, write that it is ready, then answer requests until one is to quit."""
    parser = argparse.ArgumentParser(prog="mthp.demo.workload", description="The process that `mthp demo` works on.")
    parser.add_argument("--size", type=int, required=True, metavar="BYTES", help="memory to grow to")
    parser.add_argument("--parent", type=int, default=os.getppid(), metavar="PID", help="process to end together with")
    arguments = parser.parse_args()
    depend_on(arguments.parent)
    # The comparison must begin with 4 KiB pages, whatever the system's switches are.
    have_small_pages_only()
    prctl(PR_SET_NAME, COMM.encode())
    keep_the_heap_in_one_piece()
    database = Database()
    database.grow(arguments.size, progress_reporter())
    # MADV_COLLAPSE honours it, too (Documentation/admin-guide/mm/transhuge.rst).
    prctl(PR_SET_THP_DISABLE, 0)
    say({"event": "ready"})
    for line in sys.stdin:
        reply = answer(database, line)
        say(reply)
        if not reply:
            break
    # Skip the clean-up: freeing the database page by page is slower than letting the kernel drop the whole.
    os._exit(0)


if __name__ == "__main__":
    main()
