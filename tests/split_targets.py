"""A target with holes that checks its own bytes while its folios are made and split (``programs/split_churn.c``)."""

from __future__ import annotations

import signal
import subprocess
from types import TracebackType
from typing import Self

from mover_targets import compiled
from waiting import FACTOR


class Churn:
    """The running program. A context manager; leaving it ends the process.

    Attributes:
        pid: its PID.
        address, size: its memory.
        accesses: how many accesses its threads made; known once it has finished.
        waits: how many of them took 2**n to 2**(n + 1) nanoseconds since it was continued last, by n; known once it has
            finished.
    """

    def __init__(self, threads: int, megabytes: int, percent: int, flags: str = "-") -> None:
        # An emulated processor is too slow for all threads, so the tested program has priority.
        flags += "n" if FACTOR > 1 else ""
        command = [str(compiled("split_churn")), str(threads), str(megabytes), str(percent), flags]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.pid = self._process.pid
        assert self._process.stdout is not None
        self.address, self.size = map(int, self._process.stdout.readline().split())
        self.accesses, self.waits = 0, [0]

    def fill_again(self) -> None:
        """Let its threads discard all memory and use as much again, and return afterwards."""
        self._process.send_signal(signal.SIGUSR1)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "filled\n"

    def finish(self) -> int:
        """Have it end and check all of its memory a last time: the number of wrong words."""
        self._process.terminate()
        assert self._process.stdout is not None
        wrong, self.accesses, *self.waits = map(int, self._process.stdout.readline().split())
        return wrong

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
