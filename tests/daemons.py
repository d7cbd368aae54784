"""A running ``mthp daemon`` for live tests, with a lock and a socket of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mthp.daemon.control import NAME, ask
from mthp.errors import MthpError
from patience import patient

PATIENCE = 20.0
"""Seconds in which anything is expected to happen; on a calm machine it takes a small part of that."""


class RunningDaemon:
    """The daemon as a process. A context manager: leaving it ends the daemon.

    Args:
        directory: for its lock, its socket and its output.
        arguments: of ``mthp daemon``.
        wait: wait until it answers.

    Attributes:
        process: the process.
    """

    def __init__(self, directory: Path, *arguments: str, wait: bool = True, prefix: tuple[str, ...] = ()) -> None:
        self._directory = directory
        self._output = directory / "daemon.err"
        directory.mkdir(exist_ok=True)
        command = [*prefix, sys.executable, "-m", "mthp", "daemon", "--run-dir", str(directory), *arguments]
        with self._output.open("ab") as output:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        if wait:
            until(self._answers, f"the daemon to answer: {self.said}")

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"it ended: {self.said}"
        with contextlib.suppress(MthpError):
            return bool(ask(self.socket, "status"))
        return False

    @property
    def socket(self) -> Path:
        """Where it is asked."""
        return self._directory / NAME

    @property
    def said(self) -> str:
        """What it printed."""
        return self._output.read_text()

    def status(self) -> dict[str, Any]:
        """What ``mthp status`` tells."""
        return ask(self.socket, "status")

    def target(self, pid: int) -> dict[str, Any] | None:
        """What it tells of one target."""
        return next((target for target in self.status()["targets"] if target["pid"] == pid), None)

    def collapsed(self, pid: int) -> int:
        """Bytes collapsed in one target."""
        target = self.target(pid)
        return int(target["collapsed_bytes"]) if target else 0

    def stop(self, number: int = signal.SIGTERM) -> float:
        """End it; gives how many seconds that took."""
        begun = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(timeout=patient(PATIENCE))
        return time.monotonic() - begun

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.stop()


def until(done: Callable[[], bool], what: str, seconds: float = PATIENCE) -> None:
    """Wait for something."""
    deadline = time.monotonic() + patient(seconds)
    while not done():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def events_of(path: Path) -> list[dict[str, Any]]:
    """The whole lines of an event log."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{") and line.endswith("}")]


def threads_of(pid: int) -> dict[int, str]:
    """The threads of a process, and the state of each."""
    states = {}
    for tid in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208
        text = Path(f"/proc/{pid}/task/{tid}/stat").read_text()
        states[int(tid)] = text.rpartition(")")[2].split()[0]
    return states
