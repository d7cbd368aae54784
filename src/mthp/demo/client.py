"""Run the demo's workload (:mod:`mthp.demo.workload`) as a separate process, and send it commands.

The workload never outlives its user: :class:`Workload` ends it whenever the ``with`` block is left, and the kernel ends
it when the thread that started it ends (PR_SET_PDEATHSIG, prctl(2)). So start it from a thread that lives as long as
the work does.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mthp.budget import MemoryBound
from mthp.closing import Closing
from mthp.errors import MthpError, TargetVanishedError, UnsupportedError, UsageError
from mthp.metrics import Durations
from mthp.progress import StepProgress

MIN_SIZE = 32 << 20
"""Smallest workload, in bytes: with less, most of it would be the interpreter's own memory."""

ANSWER_TIMEOUT = 120.0
"""Seconds to wait for a line from the workload, beyond the requested time, before it counts as stuck."""

SLOWEST_BYTES_PER_S = 100 << 20
"""Least speed of reading all the data, in bytes per second: a tenth of an ordinary machine's. Extends the time-out."""

STDERR_TAIL_BYTES = 2000


@dataclass(frozen=True, slots=True)
class Measurement:
    """Speed of random lookups in one process.

    Attributes:
        lookups: number of lookups.
        seconds: duration by the clock.
        lookups_per_s: the median over some hundreds of batches, per second of the workload's processor time.
        low: lower quartile of the same.
        high: upper quartile of the same.
        checksum: checksum of the first batches' results; equal in every measurement of the same data.
    """

    lookups: int
    seconds: float
    lookups_per_s: float
    low: float
    high: float
    checksum: int


@dataclass(frozen=True, slots=True)
class DataCheck:
    """Result of reading all the data; equal before and after a collapse.

    Attributes:
        rows: number of documents.
        total: sum of their ranks.
        crc: CRC-32 sums of all bodies, added up with weights that depend on the key.
        intact: whether SQLite found its own structures whole.
    """

    rows: int
    total: int
    crc: int
    intact: bool


class Workload(Closing):
    """The workload process, held by a ``with`` block that ends it.

    Args:
        program: the interpreter to run it in; this one if None.
        timeout: seconds to wait for an answer, on top of those that the question takes.

    Example:
        >>> with Workload() as workload:  # doctest: +SKIP
        ...     workload.start(fit_size(1 << 30))
        ...     workload.measure(2.0).lookups_per_s
    """

    def __init__(self, program: str | None = None, timeout: float = ANSWER_TIMEOUT) -> None:
        self._program, self._timeout = program or sys.executable, timeout
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: int | None = None
        self._pending = b""
        self._patience = 0.0

    @property
    def pid(self) -> int:
        """The PID of the workload.

        Raises:
            UsageError: the workload was not started.
        """
        return self._running().pid

    def start(self, size: int, progress: StepProgress | None = None) -> None:
        """Start the process and wait until it has grown and is ready, as :meth:`begin` and :meth:`await_ready` do."""
        self.begin(size)
        self.await_ready(progress)

    def begin(self, size: int) -> None:
        """Start the process.

        Args:
            size: memory to grow to, in bytes; see `fit_size`.

        Raises:
            UsageError: `size` is below `MIN_SIZE`, or the workload runs already.
            MthpError: the process did not start.
        """
        if size < MIN_SIZE:
            raise UsageError(f"size of {size} bytes for the demo's workload: at least {MIN_SIZE} are needed")
        if self._process is not None:
            raise UsageError(f"the demo's workload runs already, as PID {self._process.pid}")
        # -P, because the working directory may have modules of the same names.
        command = [self._program, "-P", "-m", "mthp.demo.workload", "--size", str(size), "--parent", str(os.getpid())]
        self._patience = self._timeout + size / SLOWEST_BYTES_PER_S
        try:
            # A file in memory, because a pipe would fill up while nothing reads it.
            self._stderr = os.memfd_create("mthp-demo-stderr")
            # A process group of its own, so that Ctrl-C on the terminal reaches only us, also while the child's Python
            # starts.
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, process_group=0
            )
        except OSError as error:
            self.close()
            raise MthpError(f"the demo's workload cannot be started: {error}") from error

    def await_ready(self, progress: StepProgress | None = None) -> None:
        """Wait until the workload has grown.

        Args:
            progress: called from time to time meanwhile.

        Raises:
            MthpError: the workload ended; the end of its standard error is in ``help``.
        """
        try:
            while (message := self._receive()).get("event") != "ready":
                if progress is not None:
                    progress(message["done_bytes"], message["total_bytes"], message["phase"])
        except BaseException:
            self.close()
            raise

    def measure(self, seconds: float) -> Measurement:
        """Have the workload do random lookups for about `seconds`, and return their speed.

        Raises:
            MthpError: the workload ended, or does not answer.
        """
        return Measurement(**self._ask({"cmd": "measure", "seconds": seconds}, seconds))

    def verify(self) -> DataCheck:
        """Have the workload read all its data, and return the result.

        Raises:
            MthpError: the workload ended, or does not answer.
        """
        return DataCheck(**self._ask({"cmd": "verify"}))

    @contextlib.contextmanager
    def serving(self) -> Iterator[list[Durations]]:
        """Have the workload look up single documents meanwhile; the yielded list holds their durations afterwards.

        Raises:
            MthpError: the workload ended, or does not answer.
        """
        waits: list[Durations] = []
        self._ask({"cmd": "serve"})
        try:
            yield waits
        finally:
            # Also after an error, because the workload takes no other request meanwhile. After Ctrl-C just before the
            # with-statement's body, Python comes here last, when the workload is closed.
            if self._process is not None:
                waits.append(Durations(**self._ask({"cmd": "stop"})))

    def collapse_itself(self) -> float:
        """Have the workload collapse its own memory to huge pages, and return the seconds that it took.

        Raises:
            MthpError: the workload cannot collapse, or ended, or does not answer.
        """
        return float(self._ask({"cmd": "collapse"})["elapsed"])

    def close(self) -> None:
        """Kill the process and wait for it. May be called at any time, and again."""
        process, self._process = self._process, None
        if process is not None:
            # It has nothing worth saving, and this works also when it is busy, stopped or traced.
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        if self._stderr is not None:
            os.close(self._stderr)
            self._stderr = None
        self._pending = b""

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise UsageError("the demo's workload is not running", help="call start() first")
        return self._process

    def _ask(self, request: dict[str, object], seconds: float = 0.0) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None
        try:
            # Bypass the buffered writer, which would retry the write at close and fail there.
            os.write(process.stdin.fileno(), json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise self._ended() from None
        reply = self._receive(seconds)
        if "error" in reply:
            raise MthpError(f"the demo's workload refuses {request}: {reply['error']}")
        return reply

    def _receive(self, seconds: float = 0.0) -> dict[str, Any]:
        """Return the next line from the workload, which first works for `seconds`."""
        timeout = seconds + self._patience
        process = self._running()
        assert process.stdout is not None
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        deadline = time.monotonic() + timeout
        while b"\n" not in self._pending:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise MthpError(f"the demo's workload, PID {process.pid}, has not answered for {timeout:.0f} s")
            # Past the buffer of the file object, which poll(2) does not see.
            received = os.read(process.stdout.fileno(), 1 << 16)
            if not received:
                raise self._ended()
            self._pending += received
        line, _, self._pending = self._pending.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _ended(self) -> TargetVanishedError:
        """Return the error for a workload that ended, with the end of its standard error."""
        process, stderr = self._running(), self._stderr
        assert stderr is not None
        try:
            # It may have closed only its output.
            status = process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return TargetVanishedError(f"the demo's workload, PID {process.pid}, closed its output")
        start = max(0, os.fstat(stderr).st_size - STDERR_TAIL_BYTES)
        tail = os.pread(stderr, STDERR_TAIL_BYTES, start).decode(errors="replace").strip()
        how = f"exited with status {status}" if status >= 0 else f"was ended by a signal: {signal.strsignal(-status)}"
        return TargetVanishedError(
            f"the demo's workload, PID {process.pid}, {how}",
            help=tail or "if the system ran out of memory, use a smaller size",
        )


def fit_size(wanted: int, bounds: Sequence[MemoryBound], workloads: int) -> int:
    """Return the size for each workload: `wanted`, or less, so that all take half of the memory that is free at most.

    Args:
        wanted: bytes.
        bounds: the limits that memory of this process counts against.
        workloads: number of workloads.

    Raises:
        UsageError: `wanted` is below `MIN_SIZE`.
        UnsupportedError: memory does not allow `MIN_SIZE`.
    """
    if wanted < MIN_SIZE:
        raise UsageError(f"size of {wanted} bytes for the demo's workload: at least {MIN_SIZE} are needed")
    left = min((bound.left for bound in bounds), default=wanted * 3 * workloads)
    # A third: while it grows, and after a collapse to huge pages, a workload has up to half more than its size.
    allowed = left // 3 // workloads
    if allowed < MIN_SIZE:
        raise UnsupportedError(
            f"{left} bytes of memory are left here, which is too little for the demo's workloads",
            help=f"free some, or raise the limit of the control group, to {MIN_SIZE * 3 * workloads} bytes at least",
        )
    return min(wanted, allowed)
